package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// peer is whose socket the other end of a connection is.
type peer struct {
	uid   int
	pid   int    // 0: not known yet
	inode uint64 // of the socket; 0: not known
}

// peerOf asks the kernel who is at the other end of a connection from this machine. The error is also that of one from
// another machine, and of an end that has been closed and is nobody's any more.
func peerOf(c net.Conn) (peer, error) {
	switch c := c.(type) {
	case *net.UnixConn:
		raw, err := c.SyscallConn()
		if err != nil {
			return peer{}, err
		}
		var cred *unix.Ucred
		if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
			return peer{}, e
		}
		if err != nil {
			return peer{}, err
		}
		return peer{uid: int(cred.Uid), pid: int(cred.Pid)}, nil
	case *net.TCPConn:
		// Its own address is this end's remote one.
		its, other := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
		p, err := sockDiag(its, other)
		if err != nil && !errors.Is(err, unix.ENOENT) { // a kernel, or a sandbox, without it
			p, err = procNet(its, other, "/proc/net/tcp", "/proc/net/tcp6")
		}
		if errors.Is(err, unix.ENOENT) {
			err = errors.New("no socket of this machine is at the other end")
		}
		if err == nil && p.uid == 0 && p.inode == 0 {
			err = errors.New("the other end is closed: nobody owns it any more") // the kernel says root
		}
		return p, err
	}
	return peer{}, fmt.Errorf("a %T has no owner", c)
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// sockDiag finds a TCP socket by its addresses with sock_diag(7), without a look at any other. unix.ENOENT: there is none.
func sockDiag(its, other netip.AddrPort) (peer, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return peer{}, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return peer{}, err
	}
	family := byte(unix.AF_INET6)
	if its.Addr().Is4() {
		family = unix.AF_INET
	}
	const headSize, requestSize = unix.SizeofNlMsghdr, 56
	b := make([]byte, 0, headSize+requestSize)
	// struct nlmsghdr
	b = binary.NativeEndian.AppendUint32(b, headSize+requestSize)
	b = binary.NativeEndian.AppendUint16(b, unix.SOCK_DIAG_BY_FAMILY)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, make([]byte, 8)...) // sequence, port
	// struct inet_diag_req_v2
	b = append(b, family, unix.IPPROTO_TCP, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, ^uint32(0)) // in whatever state
	// struct inet_diag_sockid
	b = binary.BigEndian.AppendUint16(b, its.Port())
	b = binary.BigEndian.AppendUint16(b, other.Port())
	for _, a := range []netip.Addr{its.Addr(), other.Addr()} {
		var field [16]byte
		copy(field[:], a.AsSlice())
		b = append(b, field[:]...)
	}
	b = append(b, make([]byte, 4)...)                   // any interface
	b = binary.NativeEndian.AppendUint32(b, ^uint32(0)) // any cookie: INET_DIAG_NOCOOKIE
	b = binary.NativeEndian.AppendUint32(b, ^uint32(0))
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return peer{}, err
	}
	answer := make([]byte, 4096)
	n, from, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return peer{}, err
	}
	if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
		return peer{}, errors.New("sock_diag: an answer that is not the kernel's")
	}
	// struct inet_diag_msg: family and so on (4), sockid (48), expires, rqueue, wqueue, uid, inode
	const portsAt, uidAt = headSize + 4, headSize + 4 + 48 + 12
	kind := uint16(0)
	if n >= headSize {
		kind = binary.NativeEndian.Uint16(answer[4:])
	}
	switch {
	case kind == unix.NLMSG_ERROR && n >= headSize+4:
		return peer{}, unix.Errno(-int32(binary.NativeEndian.Uint32(answer[headSize:])))
	case kind != unix.SOCK_DIAG_BY_FAMILY || n < uidAt+8:
		return peer{}, errors.New("sock_diag: an answer that can't be read")
	case binary.BigEndian.Uint16(answer[portsAt:]) != its.Port() || binary.BigEndian.Uint16(answer[portsAt+2:]) != other.Port():
		// Where there is no connection the kernel goes on to whoever listens on the port (inet_lookup), such as this forward
		// itself if another machine comes from the port that it comes to. A listener has no port at the other end.
		return peer{}, unix.ENOENT
	}
	return peer{
		uid: int(binary.NativeEndian.Uint32(answer[uidAt:])), inode: uint64(binary.NativeEndian.Uint32(answer[uidAt+4:])),
	}, nil
}

// procNet does the same with the files of proc_pid_net(5), which it reads from the first socket to the one looked for.
func procNet(its, other netip.AddrPort, files ...string) (peer, error) {
	for _, name := range files {
		p, err := procNetFile(its, other, name)
		if !errors.Is(err, unix.ENOENT) {
			return p, err
		}
	}
	return peer{}, unix.ENOENT
}

func procNetFile(its, other netip.AddrPort, name string) (peer, error) {
	f, err := os.Open(name)
	if err != nil {
		return peer{}, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Scan() // the heading
	for lines.Scan() {
		// sl local rem st tx:rx tr:when retrnsmt uid timeout inode ...
		fs := strings.Fields(lines.Text())
		if len(fs) < 10 || procAddr(fs[1]) != its || procAddr(fs[2]) != other {
			continue
		}
		uid, err1 := strconv.Atoi(fs[7])
		inode, err2 := strconv.ParseUint(fs[9], 10, 64)
		return peer{uid: uid, inode: inode}, errors.Join(err1, err2)
	}
	if err := lines.Err(); err != nil {
		return peer{}, err
	}
	return peer{}, unix.ENOENT
}

// procAddr reads an address as the kernel prints it: words of 32 bits in its own byte order, in hexadecimal, and the port.
func procAddr(s string) netip.AddrPort {
	address, portText, _ := strings.Cut(s, ":")
	port, err := strconv.ParseUint(portText, 16, 16)
	if err != nil || len(address)%8 != 0 {
		return netip.AddrPort{}
	}
	var b []byte
	for ; address != ""; address = address[8:] {
		word, err := strconv.ParseUint(address[:8], 16, 32)
		if err != nil {
			return netip.AddrPort{}
		}
		b = binary.NativeEndian.AppendUint32(b, uint32(word))
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(port))
}

// finder finds processes by their sockets. One looks at a time; those who come meanwhile share the next look.
type finder struct {
	looking chan struct{} // holds an element while somebody looks

	mu     sync.Mutex // guards what follows
	next   *look      // nil: nobody waits
	recent []int      // processes that were found, the last one first
}

type look struct {
	wanted map[uint64]int // by inode
	done   chan struct{}
}

const (
	lookTime  = time.Second // a machine that is busy; else it takes some milliseconds
	maxRecent = 16
)

func newFinder() *finder { return &finder{looking: make(chan struct{}, 1)} }

// find returns a process of this user that has the socket; 0: none was found in a second. It is what policy and audit are
// told, a claim: a process can pass its socket on.
func (f *finder) find(ctx context.Context, inode uint64) int {
	f.mu.Lock()
	l := f.next
	first := l == nil
	if first {
		l = &look{map[uint64]int{}, make(chan struct{})}
		f.next = l
	}
	l.wanted[inode] = 0
	f.mu.Unlock()
	if first {
		f.looking <- struct{}{}
		f.mu.Lock()
		f.next = nil
		recent := slices.Clone(f.recent)
		f.mu.Unlock()
		hits := l.look(recent)
		f.mu.Lock()
		for _, pid := range hits {
			f.recent = slices.Insert(slices.DeleteFunc(f.recent, func(p int) bool { return p == pid }), 0, pid)
		}
		f.recent = f.recent[:min(len(f.recent), maxRecent)]
		f.mu.Unlock()
		close(l.done)
		<-f.looking
	}
	select {
	case <-l.done:
		return l.wanted[inode]
	case <-ctx.Done():
		return 0
	}
}

// look looks at the processes that had what was looked for before, then at all of this user's, the youngest first. It
// returns those that have something.
func (l *look) look(recent []int) (hits []int) {
	end := time.Now().Add(lookTime)
	missing := len(l.wanted)
	try := func(pid int) {
		dir, err := os.Open("/proc/" + strconv.Itoa(pid) + "/fd")
		if err != nil {
			return // it has ended, or lets nobody look
		}
		defer dir.Close()
		for err == nil && missing > 0 {
			var names []string
			names, err = dir.Readdirnames(256)
			for _, name := range names {
				inode, ok := socketInode(int(dir.Fd()), name)
				if had, wanted := l.wanted[inode]; ok && wanted && had == 0 {
					l.wanted[inode] = pid
					missing--
					hits = append(hits, pid)
				}
			}
		}
	}
	for _, pid := range recent {
		if missing > 0 {
			try(pid)
		}
	}
	if missing == 0 {
		return hits
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return hits
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	slices.Reverse(pids)
	for _, pid := range pids {
		if missing == 0 || time.Now().After(end) {
			break
		}
		if fi, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid))); err == nil && mine(fi) {
			try(pid)
		}
	}
	return hits
}

// socketInode reads the link of a descriptor: socket:[123].
func socketInode(dir int, name string) (uint64, bool) {
	var b [64]byte
	n, err := unix.Readlinkat(dir, name, b[:])
	if err != nil {
		return 0, false
	}
	text, ok := strings.CutPrefix(string(b[:n]), "socket:[")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64)
	return inode, err == nil
}
