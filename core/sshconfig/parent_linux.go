package sshconfig

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxParents bounds the walk up the process tree, which can change under it.
const maxParents = 64

// FindParent looks for the ssh that started this process: the nearest ancestor, up to the session leader, whose
// executable is named ssh.
func FindParent() (Parent, bool) {
	session, ok := processStat(os.Getpid())
	if !ok {
		return Parent{}, false
	}
	pid := os.Getppid()
	for range maxParents {
		stat, ok := processStat(pid)
		if !ok || pid <= 1 {
			return Parent{}, false
		}
		if p, ok := readParent(pid); ok {
			return p, true
		}
		if pid == session.session {
			return Parent{}, false
		}
		pid = stat.ppid
	}
	return Parent{}, false
}

type stat struct{ ppid, session int }

// processStat reads proc_pid_stat(5). The name in it is in parentheses and may hold anything.
func processStat(pid int) (stat, bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, false
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 4 {
		return stat{}, false
	}
	ppid, err1 := strconv.Atoi(fields[1])
	session, err2 := strconv.Atoi(fields[3])
	return stat{ppid, session}, err1 == nil && err2 == nil
}

func readParent(pid int) (Parent, bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(text) == 0 {
		return Parent{}, false
	}
	argv := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
	// An upgrade replaces the executable of a running ssh; then the one on PATH serves.
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	exe, deleted := strings.CutSuffix(exe, " (deleted)")
	name := exe
	if err != nil {
		name = argv[0]
	}
	if filepath.Base(name) != "ssh" {
		return Parent{}, false
	}
	p := Parent{PID: pid, Args: argv[1:]}
	if err == nil && !deleted {
		p.Exe = exe
	}
	return p, true
}
