package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

// A frame is four bytes of length, big-endian, of what follows; one byte that says what it is; and JSON. Files travel
// with its first byte (SCM_RIGHTS, unix(7)).
const (
	// MaxFrame bounds the type and the body of a frame together.
	MaxFrame = 1 << 20
	// maxFiles is how many files a frame carries at most.
	maxFiles = 2
	// maxText bounds what a person is to read; senders cut it off there.
	maxText = 4096
)

type frameType byte

const (
	helloFrame frameType = 1 + iota
	answerFrame
	resolutionFrame
	noteFrame
)

func (t frameType) String() string {
	switch t {
	case helloFrame:
		return "hello"
	case answerFrame:
		return "answer"
	case resolutionFrame:
		return "resolution"
	case noteFrame:
		return "note"
	}
	return fmt.Sprintf("frame of type %d", byte(t))
}

var (
	// ErrMalformed is wrapped by the error for a frame that breaks the rules: the connection is of no use any more.
	ErrMalformed = errors.New("malformed frame")
	// ErrVersion is wrapped by ReadHello's error if the bridge speaks another version; Hello.Version says which, and
	// nothing else of the hello was read. An answer can still be sent.
	ErrVersion = errors.New("bridge and master are of different versions")
)

// Conn reads and writes frames. One goroutine may read while another one writes, not more. Reads take no byte beyond
// the frame, so what follows the last frame can be read from NetConn. The error at a clean end is io.EOF.
type Conn struct {
	c   *net.UnixConn
	oob []byte // room for one read's control messages
}

// NewConn starts on a connection to the other side, which Close closes.
func NewConn(c *net.UnixConn) *Conn { return &Conn{c: c, oob: make([]byte, oobSize)} }

// NetConn is the connection below: for deadlines, the peer's credentials, and the stream after the last frame.
func (c *Conn) NetConn() *net.UnixConn { return c.c }

// Close closes the connection.
func (c *Conn) Close() error { return c.c.Close() }

// SendHello sends a bridge's first frame. With Mode Pipes, files are what it has as fds 0 and 1; else there are none.
// They stay the caller's, who may close them when SendHello has returned.
func (c *Conn) SendHello(h Hello, files ...syscall.Conn) error {
	if err := h.Check(); err != nil {
		return err
	}
	if len(files) != h.files() {
		return fmt.Errorf("hello: %d files with mode %q, want %d", len(files), h.Mode, h.files())
	}
	return c.send(helloFrame, h, files...)
}

// ReadHello reads and checks a bridge's first frame. With Mode Pipes, files are its fds 0 and 1, each a pipe or socket
// in non-blocking mode; else files is nil. They are the caller's to close.
func (c *Conn) ReadHello() (h Hello, files []*os.File, err error) {
	body, fds, err := c.read(helloFrame)
	if err != nil {
		return Hello{}, nil, err
	}
	defer func() {
		if err != nil {
			closeFiles(fds)
		}
	}()
	var v struct{ Version int }
	if err := decode(helloFrame, body, &v); err != nil {
		return Hello{}, nil, err
	}
	if v.Version != Version {
		return Hello{Version: v.Version}, nil, fmt.Errorf("%w: %d and %d", ErrVersion, v.Version, Version)
	}
	if err := decode(helloFrame, body, &h); err != nil {
		return Hello{}, nil, err
	}
	if err := h.Check(); err != nil {
		return Hello{}, nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(fds) != h.files() {
		return Hello{}, nil, fmt.Errorf("%w: hello with %d files for mode %q", ErrMalformed, len(fds), h.Mode)
	}
	files, err = openStreams(fds)
	return h, files, err
}

// SendAnswer sends the master's reply to a hello or a resolution.
func (c *Conn) SendAnswer(a Answer) error {
	a.Message = clip(a.Message)
	if err := a.check(); err != nil {
		return err
	}
	return c.send(answerFrame, a)
}

// ReadAnswer reads the master's reply to a hello or a resolution.
func (c *Conn) ReadAnswer() (Answer, error) {
	var a Answer
	if err := c.readPlain(answerFrame, &a); err != nil {
		return Answer{}, err
	}
	if err := a.check(); err != nil {
		return Answer{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return a, nil
}

// SendResolution sends the bridge's reply to Resolve. If r.Agent is set, agent is a connected socket of the agent;
// else agent is nil. It stays the caller's, who may close it when SendResolution has returned.
func (c *Conn) SendResolution(r Resolution, agent syscall.Conn) error {
	r.Error = clip(r.Error)
	if err := r.check(); err != nil {
		return err
	}
	if r.Agent != (agent != nil) {
		return errors.New("resolution: the agent's socket is missing, or not announced")
	}
	if agent == nil {
		return c.send(resolutionFrame, r)
	}
	return c.send(resolutionFrame, r, agent)
}

// ReadResolution reads the bridge's reply to Resolve. If Agent is set, agent is the connected socket of the agent, in
// non-blocking mode and the caller's to close; else it is nil.
func (c *Conn) ReadResolution() (r Resolution, agent *os.File, err error) {
	body, fds, err := c.read(resolutionFrame)
	if err != nil {
		return Resolution{}, nil, err
	}
	defer func() {
		if err != nil {
			closeFiles(fds)
		}
	}()
	if err := decode(resolutionFrame, body, &r); err != nil {
		return Resolution{}, nil, err
	}
	if err := r.check(); err != nil {
		return Resolution{}, nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	want := 0
	if r.Agent {
		want = 1
	}
	if len(fds) != want {
		return Resolution{}, nil, fmt.Errorf("%w: resolution with %d files, want %d", ErrMalformed, len(fds), want)
	}
	files, err := openStreams(fds)
	if err != nil || want == 0 {
		return r, nil, err
	}
	return r, files[0], nil
}

// SendNote sends text for the person at the client, or news about the client.
func (c *Conn) SendNote(n Note) error {
	n.Text = clip(n.Text)
	return c.send(noteFrame, n)
}

// ReadNote reads what the master sends while the bridge waits; io.EOF says that the client has ended.
func (c *Conn) ReadNote() (Note, error) {
	var n Note
	if err := c.readPlain(noteFrame, &n); err != nil {
		return Note{}, err
	}
	if len(n.Text) > maxText {
		return Note{}, fmt.Errorf("%w: note of %d bytes", ErrMalformed, len(n.Text))
	}
	return n, nil
}

// send writes one frame. The files go with its first byte.
func (c *Conn) send(t frameType, v any, files ...syscall.Conn) error {
	buf := bytes.NewBuffer(make([]byte, 5, 512))
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("%v: %w", t, err)
	}
	frame := buf.Bytes()
	if len(frame)-4 > MaxFrame {
		return fmt.Errorf("%v of %d bytes: too long, at most %d", t, len(frame)-4, MaxFrame)
	}
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
	frame[4] = byte(t)
	if len(files) == 0 {
		_, err := c.c.Write(frame)
		return err
	}
	n, err := c.writeFiles(frame, files)
	if err == nil && n < len(frame) {
		_, err = c.c.Write(frame[n:])
	}
	return err
}

// readPlain reads a frame without files.
func (c *Conn) readPlain(t frameType, v any) error {
	body, fds, err := c.read(t)
	if err != nil {
		return err
	}
	if len(fds) > 0 {
		closeFiles(fds)
		return fmt.Errorf("%w: %v with files", ErrMalformed, t)
	}
	return decode(t, body, v)
}

// read reads one frame of type t. The fds that came with it are the caller's; there are none with an error.
func (c *Conn) read(t frameType) (body []byte, fds []int, err error) {
	defer func() {
		if err != nil {
			closeFiles(fds)
			fds = nil
		}
	}()
	var head [5]byte
	if n, err := c.readFull(head[:], &fds); err != nil {
		if n > 0 && err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fds, err
	}
	size := binary.BigEndian.Uint32(head[:])
	switch {
	case size == 0 || size > MaxFrame:
		return nil, fds, fmt.Errorf("%w: length %d, not 1 to %d", ErrMalformed, size, MaxFrame)
	case frameType(head[4]) != t:
		return nil, fds, fmt.Errorf("%w: %v, want %v", ErrMalformed, frameType(head[4]), t)
	}
	body = make([]byte, size-1)
	if _, err := c.readFull(body, &fds); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fds, err
	}
	return body, fds, nil
}

func decode(t frameType, body []byte, v any) error {
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%w: %v: %w", ErrMalformed, t, err)
	}
	return nil
}
