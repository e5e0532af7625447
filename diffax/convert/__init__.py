"""Weights of other frameworks: where each parameter stands in their files, a file a family.

A family's file says, for a Linen module of ours, under which names and in which layout its
parameters stand in published files (`tensors.Stored`); `tensors` reads and writes them so.
"""
