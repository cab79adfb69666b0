/* Runs a command through libssh.
 *
 * Usage: libssh_client PROXYCOMMAND HOST PORT USER KNOWN_HOSTS COMMAND
 *
 * stdin, stdout, stderr and the exit status are the command's. stdin is read to its end before anything is written, so
 * it must fit into what the command takes without having its output read, which is the channel's window at least.
 */
#include <libssh/libssh.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static ssh_session session;

static void check(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "libssh: %s: %s\n", what, ssh_get_error(session));
	exit(254);
}

int main(int argc, char **argv)
{
	static char buf[32768];
	ssh_channel channel;
	unsigned int port;
	int process_config = 0, n, status;

	if (argc != 7)
		return 2;
	session = ssh_new();
	port = (unsigned int)atoi(argv[3]);
	check(ssh_options_set(session, SSH_OPTIONS_HOST, argv[2]) == 0, "host");
	check(ssh_options_set(session, SSH_OPTIONS_PORT, &port) == 0, "port");
	check(ssh_options_set(session, SSH_OPTIONS_USER, argv[4]) == 0, "user");
	check(ssh_options_set(session, SSH_OPTIONS_KNOWNHOSTS, argv[5]) == 0, "known_hosts");
	check(ssh_options_set(session, SSH_OPTIONS_GLOBAL_KNOWNHOSTS, "/dev/null") == 0, "global known_hosts");
	check(ssh_options_set(session, SSH_OPTIONS_PROCESS_CONFIG, &process_config) == 0, "config");
	check(ssh_options_set(session, SSH_OPTIONS_PROXYCOMMAND, argv[1]) == 0, "proxy command");
	check(ssh_connect(session) == SSH_OK, "connect");
	check(ssh_session_is_known_server(session) == SSH_KNOWN_HOSTS_OK, "host key");
	check(ssh_userauth_none(session, NULL) == SSH_AUTH_SUCCESS, "login");
	channel = ssh_channel_new(session);
	check(ssh_channel_open_session(channel) == SSH_OK, "session");
	check(ssh_channel_request_exec(channel, argv[6]) == SSH_OK, "exec");
	while ((n = (int)read(0, buf, sizeof buf)) > 0)
		check(ssh_channel_write(channel, buf, (uint32_t)n) == n, "write");
	check(ssh_channel_send_eof(channel) == SSH_OK, "eof");
	while ((n = ssh_channel_read(channel, buf, sizeof buf, 0)) > 0)
		check(fwrite(buf, 1, (size_t)n, stdout) == (size_t)n, "stdout");
	check(n == 0, "read");
	while ((n = ssh_channel_read(channel, buf, sizeof buf, 1)) > 0)
		check(fwrite(buf, 1, (size_t)n, stderr) == (size_t)n, "stderr");
	check(n == 0, "read stderr");
	status = ssh_channel_get_exit_status(channel);
	ssh_channel_free(channel);
	ssh_disconnect(session);
	ssh_free(session);
	fflush(stdout);
	return status;
}
