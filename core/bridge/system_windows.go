package bridge

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
)

// There is no master on Windows so far: package paths can't tell there whom a directory belongs to. What works is the
// way without one.

const noFollow = 0

// replace runs a program with this process's streams and ends with its status, since there is no execve(2).
func replace(path string, argv []string) error {
	cmd := &exec.Cmd{Path: path, Args: argv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	os.Exit(cmd.ProcessState.ExitCode())
	return nil
}

func closeOnExec() {} // handles are not inherited unless listed

func isStream(*os.File) bool { return false }

func isUnixSocket(*os.File) bool { return false }

func letGo(...*os.File) error { return errors.ErrUnsupported }

func sendSocket(*os.File, syscall.Conn) error { return errors.ErrUnsupported }

func socketPair() (ours, theirs *os.File, err error) { return nil, nil, errors.ErrUnsupported }

type input struct{ *os.File }

func newInput(f *os.File) input { return input{f} }

// stop reports that a Read can't be ended.
func (input) stop() bool { return false }

func (input) release() {}

type child struct{}

func spawn(string, []string, []string, *os.File) (child, error) {
	return child{}, errors.ErrUnsupported
}

func (child) exited() (bool, string) { return true, "" }
func (child) terminate()             {}
func (child) release()               {}
