"""The tutorial runs from top to bottom in a fresh kernel, and its samples lie where data lie."""

import ast
import pathlib

import nbclient
import nbformat

TUTORIAL = pathlib.Path(__file__).parent.parent / 'experiments' / 'tutorial' / 'tutorial.ipynb'


def test_tutorial(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # a reader's kernel has one device
  notebook = nbformat.read(TUTORIAL, as_version=4)
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
  last = [cell for cell in notebook.cells if cell.cell_type == 'code'][-1]
  distance = ast.literal_eval(last.outputs[0]['data']['text/plain'])
  assert distance['samples'] < 1.5 * distance['fresh_data'] < 0.5 * distance['noise']
