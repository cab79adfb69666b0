package bridge

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/muxproxy/muxproxy/core/wire"
)

// Usage is what `muxproxy --help` prints.
const Usage = `usage: muxproxy [-F FILE] [-i FILE] [-o OPTION] [--fdpass] USER@HOST:PORT [ALIAS]
       muxproxy COMMAND [ARGUMENT...]

ssh starts the first form, as the lines say that 'muxproxy setup' writes for ~/.ssh/config:

    Host *
        ProxyCommand /home/YOU/.local/bin/muxproxy --fdpass '%r@%h:%p' '%n'
        ProxyUseFdpass yes
        GlobalKnownHostsFile /home/YOU/.local/state/muxproxy/known_hosts /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2
        ControlPath none

'muxproxy help' lists the commands.

  -F, -i, -o  as in ssh(1); only looked at if no ssh is found that started this
  --fdpass    pass the connection back to ssh, for ProxyUseFdpass yes

MUXPROXY_BYPASS=1 in the environment connects to the host without sharing.
`

// commandLine is what parse made of the arguments.
type commandLine struct {
	help    bool
	command bool // the first word is a command of muxproxyd
	fdpass  bool
	options []string // as in sshconfig.Args
	target  wire.Target
}

func parse(args []string) (commandLine, error) {
	var cl commandLine
	if len(args) > 0 && isCommand(args[0]) {
		return commandLine{command: true}, nil
	}
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		word := args[0]
		args = args[1:]
		if word == "--" {
			break
		}
		switch word {
		case "-h", "--help":
			return commandLine{help: true}, nil
		case "--fdpass":
			cl.fdpass = true
			continue
		}
		if len(word) < 2 || !strings.Contains("Fio", word[1:2]) {
			return commandLine{}, fmt.Errorf("unknown option %s", word)
		}
		value := word[2:]
		if value == "" {
			if len(args) == 0 {
				return commandLine{}, fmt.Errorf("option %s needs an argument", word)
			}
			value, args = args[0], args[1:]
		}
		cl.options = append(cl.options, word[:2], value)
	}
	switch {
	case len(args) == 0:
		return commandLine{}, errors.New("no USER@HOST:PORT")
	case len(args) > 2:
		return commandLine{}, fmt.Errorf("%q after USER@HOST:PORT and ALIAS: is the ProxyCommand quoted, '%%r@%%h:%%p' '%%n'?",
			args[2])
	}
	var err error
	if cl.target, err = wire.ParseTarget(args[0]); err != nil {
		return commandLine{}, err
	}
	if len(args) == 2 {
		cl.target.Alias = args[1]
	}
	return cl, nil
}

// isCommand tells a command's name from what ssh gives, which has an '@' and a ':'.
func isCommand(word string) bool {
	return word == "--version" || word != "" && word[0] != '-' && !strings.ContainsAny(word, "@:")
}

// execMaster replaces this process by muxproxyd with the same arguments. It returns only an error.
func execMaster(args []string) error {
	path, err := findMaster()
	if err != nil {
		return err
	}
	if args[0] == "--version" {
		args = []string{"version"}
	}
	return replace(path, append([]string{"muxproxyd"}, args...))
}

// findMaster is the path of muxproxyd: beside this executable, wherever links to it lead, else on PATH.
func findMaster() (string, error) {
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err == nil {
		if path, err := exec.LookPath(filepath.Join(filepath.Dir(self), "muxproxyd")); err == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath("muxproxyd")
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("muxproxyd is neither in %s nor on PATH: install it beside muxproxy", filepath.Dir(self))
	}
	return path, nil
}
