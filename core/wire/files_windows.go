package wire

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// CanPassFiles tells whether a hello can carry files here.
const CanPassFiles = false

const oobSize = 0

func (c *Conn) writeFiles([]byte, []syscall.Conn) (int, error) { return 0, errors.ErrUnsupported }

func (c *Conn) readFull(p []byte, _ *[]int) (int, error) {
	n, err := io.ReadFull(c.c, p)
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return n, err
}

func closeFiles([]int) {}

func openStreams([]int) ([]*os.File, error) { return nil, nil }
