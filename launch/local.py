"""A run of several hosts on this one machine: as many processes, each with devices of its own.

  python launch/local.py --hosts 2 --devices 4 -- python -m diffax.main --config configs/digits.py

Each host's lines are printed behind its number. When one of them dies, the others are stopped, and
the exit status is its own. SIGTERM and Ctrl-C go to all of them, as a preemption would.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 10.0  # seconds between asking a host to stop and killing it: it may wait for a dead one


def arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--hosts', type=int, default=2)
  parser.add_argument('--devices', type=int, default=1, help='virtual CPU devices of each host')
  parser.add_argument('--grace', type=float, default=GRACE, help='seconds to stop in')
  parser.add_argument('command', nargs=argparse.REMAINDER, help='-- and what each host runs')
  args = parser.parse_args(argv)
  args.command = args.command[args.command[:1] == ['--'] :]
  if not args.command:
    parser.error('say what each host runs, as -- python -m diffax.main --config ...')
  if args.hosts < 1 or args.devices < 1:
    parser.error(f'--hosts={args.hosts} --devices={args.devices}: 1 and more')
  if not shutil.which(args.command[0]):
    parser.error(f'{args.command[0]!r} is no program that can be started')
  return args


def free_port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def environment(host, hosts, devices, port):
  """The variables by which host number `host` finds the others."""
  flags = [f for f in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in f]
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
    'JAX_NUM_PROCESSES': str(hosts),
    'JAX_PROCESS_ID': str(host),
    'XLA_FLAGS': ' '.join([*flags, f'--xla_force_host_platform_device_count={devices}']),
    'PYTHONUNBUFFERED': '1',
  }


def prefix(host, lines, out):
  """Copies what a host says; where nobody reads on, it is read all the same: a full pipe stops it.
  """
  for line in lines:
    if '[Gloo] Rank ' not in line and 'connected peer ranks is' not in line:  # not news, and often
      say(f'[{host}] {line}', out)


def say(text, out):
  try:
    out.write(text)
    out.flush()
  except BrokenPipeError:  # `... | head` has read enough: the rest, and what is left, is for nobody
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def start(args, out=sys.stdout, of_host=None, processes=None):
  """The processes, and the threads that print what they say. of_host: host -> further variables.

  processes: a list that they are put into as they start.
  """
  port, processes, threads = free_port(), [] if processes is None else processes, []
  for host in range(args.hosts):
    process = subprocess.Popen(
      args.command,
      env=environment(host, args.hosts, args.devices, port) | (of_host(host) if of_host else {}),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
      start_new_session=True,  # a Ctrl-C reaches them through us alone, once
    )
    thread = threading.Thread(target=prefix, args=(host, process.stdout, out), daemon=True)
    thread.start()
    processes.append(process)
    threads.append(thread)
  return processes, threads


def send(processes, number):
  for process in processes:
    if process.poll() is None:
      try:
        os.killpg(process.pid, number)
      except ProcessLookupError:
        pass


def wait(processes, grace, out=sys.stdout):
  """The exit status of the first that fails, once all have ended; 0 where none does."""
  status, deadline = 0, None
  while any(process.poll() is None for process in processes):
    failed = [(host, p.poll()) for host, p in enumerate(processes) if p.poll()]
    if failed and deadline is None:
      host, status = failed[0]
      how = f'signal {signal.Signals(-status).name}' if status < 0 else f'status {status}'
      say(f'host {host} ended with {how}; stopping the others\n', out)
      send(processes, signal.SIGTERM)
      deadline = time.monotonic() + grace
    if deadline is not None and time.monotonic() > deadline:
      send(processes, signal.SIGKILL)
    time.sleep(0.1)
  return status or next((p.returncode for p in processes if p.returncode), 0)


def main(argv=None):
  args, processes = arguments(argv), []
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: send(processes, number))
  try:
    _, threads = start(args, processes=processes)
    status = wait(processes, args.grace)
  finally:
    send(processes, signal.SIGKILL)
  for thread in threads:
    thread.join(5)
  return status if status >= 0 else 128 - status


if __name__ == '__main__':
  sys.exit(main())
