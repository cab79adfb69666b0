package use

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Limits of what is read of a caller. A chain that is cut has its nearest processes.
const (
	maxProcesses = 32
	maxArgsBytes = 4096 // of one process's arguments
)

// String is the chain for a person, the process that connected first: "muxproxy (4123) <- ssh <- git <- zsh". It is
// escaped, and holds no arguments: those can be secret.
func (c Caller) String() string {
	if len(c.Processes) == 0 {
		return fmt.Sprintf("uid %d", c.UID)
	}
	var b strings.Builder
	for i, p := range c.Processes {
		if i > 0 {
			b.WriteString(" <- ")
		}
		name := p.Exe
		if i := strings.LastIndexByte(filepath.ToSlash(name), '/'); i >= 0 {
			name = name[i+1:]
		}
		if name == "" {
			name = "?"
		}
		b.WriteString(Printable(name))
		if i == 0 {
			fmt.Fprintf(&b, " (%d)", p.PID)
		}
	}
	return b.String()
}

// Client is the process that started muxproxy: the first of the caller's is muxproxy itself, unless it is the only one.
func (c Caller) Client() (Process, bool) {
	if len(c.Processes) == 0 {
		return Process{}, false
	}
	return c.Processes[min(1, len(c.Processes)-1)], true
}
