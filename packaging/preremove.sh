#!/bin/sh
# Before the package goes: dpkg says "remove", rpm says 0; both say something else for an upgrade.
case ${1-} in
remove | 0)
	echo 'muxproxy: for each user who has run "muxproxy setup", run "muxproxy setup --undo" before, or remove the line' >&2
	echo 'that includes a file of muxproxy from the top of ~/.ssh/config now: ssh does not work without the program.' >&2
	;;
esac
