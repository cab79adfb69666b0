"""Runs a command through paramiko.

Usage: paramiko_client.py PROXYCOMMAND HOST PORT USER KNOWN_HOSTS LOGIN COMMAND

LOGIN is key:FILE or password:WORD. stdin, stdout, stderr
and the exit status are the command's.
"""

import os
import sys
import threading

import paramiko

command, host, port, user, known_hosts, login, remote = sys.argv[1:]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.RejectPolicy())
client.load_host_keys(known_hosts)

how, _, secret = login.partition(":")
options = {"key_filename": secret} if how == "key" else {"password": secret}
client.connect(
    host, int(port), user, sock=paramiko.ProxyCommand(command), allow_agent=False, look_for_keys=False, timeout=60,
    banner_timeout=60, auth_timeout=60, **options)

channel = client.get_transport().open_session()
channel.exec_command(remote)


def feed():
    while data := sys.stdin.buffer.read1(32768):
        channel.sendall(data)
    channel.shutdown_write()


def pump(read, to):
    while data := read(32768):
        to.buffer.write(data)
        to.flush()


threading.Thread(target=feed, daemon=True).start()
threads = [
    threading.Thread(target=pump, args=(channel.recv, sys.stdout)),
    threading.Thread(target=pump, args=(channel.recv_stderr, sys.stderr)),
]
for t in threads:
    t.start()
for t in threads:
    t.join()
status = channel.recv_exit_status()
client.close()
os._exit(status)  # feed may still wait for stdin
