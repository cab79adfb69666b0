# Usage: asyncssh_server.py HOST-KEY OLD-PASSWORD NEW-PASSWORD
# An SSH server on loopback that wants OLD-PASSWORD changed to NEW-PASSWORD (RFC 4252 section 8), and then says
# "changed". It prints its port and runs until its stdin ends.
import asyncio
import sys
import warnings

warnings.simplefilter("ignore")
import asyncssh  # noqa: E402


class Server(asyncssh.SSHServer):
    def begin_auth(self, username):
        return True

    def password_auth_supported(self):
        return True

    def validate_password(self, username, password):
        if password == sys.argv[2]:
            raise asyncssh.PasswordChangeRequired("Your password has expired.")
        return False

    def change_password(self, username, old_password, new_password):
        return (old_password, new_password) == tuple(sys.argv[2:4])


def handle(process):
    process.stdout.write("changed\n")
    process.exit(0)


async def main():
    server = await asyncssh.create_server(
        Server, "127.0.0.1", 0, server_host_keys=[sys.argv[1]], process_factory=handle)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


asyncio.run(main())
