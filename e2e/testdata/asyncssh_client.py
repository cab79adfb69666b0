"""Runs a command through asyncssh.

Usage: asyncssh_client.py PROXYCOMMAND HOST PORT USER KNOWN_HOSTS COMMAND

stdin, stdout, stderr and the exit status are the command's.
"""

import asyncio
import shlex
import sys
import warnings

warnings.simplefilter("ignore")  # old ciphers of the library below
import asyncssh  # noqa: E402

command, host, port, user, known_hosts, remote = sys.argv[1:]


async def main():
    async with asyncssh.connect(
            host, int(port), username=user, known_hosts=known_hosts, proxy_command=shlex.split(command), config=None,
            agent_path=None, client_keys=None, login_timeout=60) as conn:
        result = await conn.run(remote, input=sys.stdin.buffer.read(), encoding=None)
    sys.stdout.buffer.write(result.stdout)
    sys.stderr.buffer.write(result.stderr)
    return result.exit_status


sys.exit(asyncio.run(main()))
