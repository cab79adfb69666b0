//go:build unix

package wire

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// CanPassFiles tells whether a hello can carry files here.
const CanPassFiles = true

// oobSize is room for the most files that one message can carry (SCM_MAX_FD of Linux, 253). With less room some systems
// open the surplus all the same, and nobody would know their numbers.
var oobSize = unix.CmsgSpace(253 * 4)

// writeFiles sends the beginning of a frame with files and returns how much of it.
func (c *Conn) writeFiles(frame []byte, files []syscall.Conn) (n int, err error) {
	err = withFDs(files, nil, func(fds []int) error {
		var err error
		n, _, err = c.c.WriteMsgUnix(frame, unix.UnixRights(fds...), nil)
		return err
	})
	return n, err
}

// withFDs calls f with the descriptors of files, which can't be closed meanwhile.
func withFDs(files []syscall.Conn, fds []int, f func([]int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	if err1 := raw.Control(func(fd uintptr) { err = withFDs(files[1:], append(fds, int(fd)), f) }); err1 != nil {
		return err1
	}
	return err
}

// readFull fills p and appends the descriptors that came along to fds, which are the caller's even with an error. It
// returns io.EOF whenever the stream ends early.
func (c *Conn) readFull(p []byte, fds *[]int) (n int, err error) {
	for n < len(p) {
		m, oobn, flags, _, err := c.c.ReadMsgUnix(p[n:], c.oob)
		if oobn > 0 {
			if err := takeFDs(c.oob[:oobn], fds); err != nil {
				return n, err
			}
		}
		n += max(m, 0)
		switch {
		case errors.Is(err, io.EOF): // net has put its own error around it
			return n, io.EOF
		case err != nil:
			return n, err
		case flags&unix.MSG_CTRUNC != 0:
			return n, fmt.Errorf("%w: files were lost on the way; is the limit of open files reached?", ErrMalformed)
		case len(*fds) > maxFiles:
			return n, fmt.Errorf("%w: more than %d files", ErrMalformed, maxFiles)
		}
	}
	return n, nil
}

// takeFDs appends all descriptors of control messages to fds. ReadMsgUnix has set FD_CLOEXEC on them.
func takeFDs(oob []byte, fds *[]int) error {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("%w: control message: %w", ErrMalformed, err)
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fmt.Errorf("%w: control message: %w", ErrMalformed, err)
		}
		*fds = append(*fds, got...)
	}
	return nil
}

func closeFiles(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// openStreams makes files of descriptors; if that fails, they are still the caller's. Each must be a pipe or a socket:
// only of these can O_NONBLOCK be changed without a surprise for whoever shares a terminal or a file with the bridge.
func openStreams(fds []int) ([]*os.File, error) {
	for _, fd := range fds {
		ok, err := IsStream(fd)
		if err == nil && !ok {
			err = errors.New("a file that is neither pipe nor socket")
		}
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	var files []*os.File
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "passed by the bridge"))
	}
	return files, nil
}

// IsStream reports whether a descriptor is a pipe or a socket, as Mode Pipes demands of fds 0 and 1.
func IsStream(fd int) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, fmt.Errorf("fd %d: %w", fd, err)
	}
	return st.Mode&unix.S_IFMT == unix.S_IFIFO || st.Mode&unix.S_IFMT == unix.S_IFSOCK, nil
}
