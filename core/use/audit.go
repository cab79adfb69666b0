package use

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	auditSize  = 16 << 20 // bytes after which audit.log becomes audit.log.1
	auditQueue = 4096     // records that wait for the disk; those beyond are dropped and counted
	auditClose = 5 * time.Second
	// auditWait is how long a use waits for its record where it must be logged.
	auditWait = 5 * time.Second
	// auditCommand bounds a command that is logged whole. The record has its length.
	auditCommand = 64 << 10
)

// AuditOptions says where and how an Audit writes.
type AuditOptions struct {
	Path    string // the file; its folder exists. The one before it is kept as Path + ".1"
	MaxSize int64  // bytes after which the file is rotated; 0: 16 MiB
	// Report is told when writing fails after it worked and when it works again, each once, by the goroutine that
	// writes. It may be nil.
	Report func(error)
}

// Audit writes two JSON lines per use, joined by "id": the decision, and the end of what was allowed. What plugins do by
// themselves is a line each ("record":"plugin").
//
// Callers don't wait for the disk, unless what can't be logged must not happen (Require): records go through a bounded
// queue to one goroutine. What a full queue or a failing disk loses is counted, and the log itself says so
// ("record":"dropped") when it can be written again. Of a command only the program word, the length and a hash under a
// random key of this Audit are written, unless it wants them whole (Full): equal commands can be told from different ones
// while the master lives, but not guessed from the log.
//
// All methods may be called by many goroutines, and on a nil *Audit, which writes nothing.
type Audit struct {
	opts AuditOptions
	key  [32]byte

	required atomic.Bool
	full     atomic.Bool

	queue   chan any
	done    chan struct{} // closed when the writer has ended
	err     error         // what Close returns; set before done closes
	dropped atomic.Uint64 // all that were lost, for Dropped

	mu     sync.RWMutex // guards closed against a send on the closed queue
	closed bool

	// The rest belongs to the writer's goroutine.
	file     *os.File // nil after a failed open
	size     int64
	torn     bool // the file ends within a line
	failing  bool
	reported uint64 // of dropped, how many the log tells of
}

// OpenAudit opens or makes the log (0600, append only, no symbolic link followed) and starts its writer. The caller calls
// Close.
func OpenAudit(opts AuditOptions) (*Audit, error) {
	if opts.MaxSize <= 0 {
		opts.MaxSize = auditSize
	}
	if opts.Report == nil {
		opts.Report = func(error) {}
	}
	a := &Audit{opts: opts, queue: make(chan any, auditQueue), done: make(chan struct{})}
	rand.Read(a.key[:]) // never fails
	if err := a.open(); err != nil {
		return nil, err
	}
	go a.write()
	return a, nil
}

// Require sets whether a use whose decision can't be logged is denied.
func (a *Audit) Require(required bool) {
	if a != nil {
		a.required.Store(required)
	}
}

// Full sets whether commands are logged whole, with the secrets in them.
func (a *Audit) Full(full bool) {
	if a != nil {
		a.full.Store(full)
	}
}

// Dropped is how many records were lost so far.
func (a *Audit) Dropped() uint64 {
	if a == nil {
		return 0
	}
	return a.dropped.Load()
}

// Close writes what is queued and closes the file. It waits at most 5 s for a disk that does not answer. Records that
// come later are dropped. A second Close returns what the first did.
func (a *Audit) Close() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	if !a.closed {
		a.closed = true
		close(a.queue)
	}
	a.mu.Unlock()
	t := time.NewTimer(auditClose)
	defer t.Stop()
	select {
	case <-a.done:
		return a.err
	case <-t.C:
		return fmt.Errorf("%s: the disk did not take the last records in %v", a.opts.Path, auditClose)
	}
}

// decisionEvent and endEvent are queued; the writer does the formatting, so that Decide stays quick. They hold no text
// of unbounded length: a command can be as long as a packet.
type decisionEvent struct {
	id     string
	use    Use // without its command
	denied *Denied
	at     time.Time
	took   time.Duration

	program    string
	command    string // "" unless it is logged whole
	commandLen int
	hash       [sha256.Size]byte

	written chan error // told whether it is in the log; nil: nobody waits
}

type endEvent struct {
	id       string
	result   Result
	at       time.Time
	duration time.Duration
}

// decision logs one. The error is nil unless records are required and this one did not get into the log in time.
func (a *Audit) decision(ctx context.Context, id string, u Use, d *Denied, at time.Time, took time.Duration) error {
	if a == nil {
		return nil
	}
	e := a.newDecision(id, u, d, at, took)
	if d != nil || !a.required.Load() {
		a.put(e)
		return nil
	}
	e.written = make(chan error, 1)
	if !a.put(e) {
		return errors.New("too many records wait for the disk")
	}
	t := time.NewTimer(auditWait)
	defer t.Stop()
	select {
	case err := <-e.written:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return fmt.Errorf("the disk did not take the record in %v", auditWait)
	}
}

// denial logs one, as far as that is possible.
func (a *Audit) denial(id string, u Use, d *Denied, at time.Time, took time.Duration) {
	if a != nil {
		a.put(a.newDecision(id, u, d, at, took))
	}
}

func (a *Audit) newDecision(id string, u Use, d *Denied, at time.Time, took time.Duration) *decisionEvent {
	e := &decisionEvent{id: id, use: u, denied: d, at: at, took: took}
	if u.Kind == Exec {
		e.program, e.commandLen = short(Program(u.Command)), len(u.Command)
		mac := hmac.New(sha256.New, a.key[:])
		io.WriteString(mac, u.Command)
		mac.Sum(e.hash[:0])
		if a.full.Load() {
			e.command = strings.Clone(u.Command[:min(len(u.Command), auditCommand)])
		}
	}
	e.use.Command = ""
	e.use.Subsystem, e.use.Addr, e.use.Name = short(u.Subsystem), short(u.Addr), short(u.Name)
	return e
}

func (a *Audit) end(id string, r Result, at time.Time, duration time.Duration) {
	r.Signal, r.Err = short(r.Signal), short(r.Err)
	a.put(&endEvent{id, r, at, duration})
}

// Record logs what a plugin did by itself: event is a word, target the USER@HOST:PORT that it is about or "", detail a
// line.
func (a *Audit) Record(plugin, event, target, detail string) {
	a.put(&pluginRecord{"plugin", time.Now(), short(plugin), short(event), short(target), short(detail)})
}

// short cuts text to what the log has room for, and lets go of the rest.
func short(s string) string {
	const most = 1024
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}

// put queues an event; false means that it is lost.
func (a *Audit) put(event any) bool {
	if a == nil {
		return true
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.closed {
		a.dropped.Add(1)
		return false
	}
	select {
	case a.queue <- event:
		return true
	default:
		a.dropped.Add(1)
		return false
	}
}

// The lines of the log. Text from outside is escaped by Printable, so that a log viewer shows it as it is.
type decisionRecord struct {
	Record      string    `json:"record"` // "decision"
	ID          string    `json:"id"`
	Time        time.Time `json:"time"`
	Decision    string    `json:"decision"` // "allow" or "deny"
	By          string    `json:"by,omitempty"`
	Reason      string    `json:"reason,omitempty"`
	Kind        Kind      `json:"kind"`
	Client      uint64    `json:"client,omitempty"`
	Target      string    `json:"target,omitempty"`
	Alias       string    `json:"alias,omitempty"`
	UID         int       `json:"uid"`
	Caller      string    `json:"caller"`
	Program     string    `json:"program,omitempty"`
	Command     string    `json:"command,omitempty"`
	CommandLen  *int      `json:"command_len,omitempty"`
	CommandHash string    `json:"command_hash,omitempty"`
	Subsystem   string    `json:"subsystem,omitempty"`
	Addr        string    `json:"addr,omitempty"`
	Name        string    `json:"name,omitempty"`
	TookMS      float64   `json:"took_ms"`
}

type endRecord struct {
	Record     string    `json:"record"` // "end"
	ID         string    `json:"id"`
	Time       time.Time `json:"time"`
	Status     string    `json:"status"`
	ExitCode   *uint32   `json:"exit_code,omitempty"`
	Signal     string    `json:"signal,omitempty"`
	In         int64     `json:"in"`
	Out        int64     `json:"out"`
	DurationMS float64   `json:"duration_ms"`
	Error      string    `json:"error,omitempty"`
}

type pluginRecord struct {
	Record string    `json:"record"` // "plugin"
	Time   time.Time `json:"time"`
	Plugin string    `json:"plugin"`
	Event  string    `json:"event"`
	Target string    `json:"target,omitempty"`
	Detail string    `json:"detail,omitempty"`
}

type droppedRecord struct {
	Record string    `json:"record"` // "dropped"
	Time   time.Time `json:"time"`
	Count  uint64    `json:"count"`
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (a *Audit) record(event any) any {
	switch e := event.(type) {
	case *decisionEvent:
		r := decisionRecord{
			Record: "decision", ID: e.id, Time: e.at, Decision: "allow", Kind: Kind(Printable(string(e.use.Kind))),
			Client: e.use.Client, UID: e.use.Caller.UID, Caller: e.use.Caller.String(),
			Alias: Printable(e.use.Target.Alias), Subsystem: Printable(e.use.Subsystem),
			Addr: Printable(e.use.Addr), Name: Printable(e.use.Name), TookMS: milliseconds(e.took),
		}
		if e.use.Target.Host != "" {
			r.Target = Printable(e.use.Target.String())
		}
		if e.denied != nil {
			r.Decision, r.By, r.Reason = "deny", Printable(e.denied.By), Printable(e.denied.Reason)
		}
		if e.use.Kind == Exec {
			r.Program, r.Command, r.CommandLen = Printable(e.program), Printable(e.command), &e.commandLen
			r.CommandHash = hex.EncodeToString(e.hash[:16])
		}
		return r
	case *endEvent:
		return endRecord{
			Record: "end", ID: e.id, Time: e.at, Status: Printable(e.result.Status), ExitCode: e.result.ExitCode,
			Signal: Printable(e.result.Signal), In: e.result.In, Out: e.result.Out,
			DurationMS: milliseconds(e.duration), Error: Printable(e.result.Err),
		}
	case *pluginRecord:
		r := *e
		r.Plugin, r.Event, r.Target, r.Detail = Printable(r.Plugin), Printable(r.Event), Printable(r.Target), Printable(r.Detail)
		return r
	}
	panic(fmt.Sprintf("use: no record for %T", event))
}

// write is the writer's goroutine: it ends when Close has closed the queue and the rest is written.
func (a *Audit) write() {
	defer close(a.done)
	var batch bytes.Buffer
	var waiting []*decisionEvent
	add := func(event any) {
		a.add(&batch, event)
		if e, ok := event.(*decisionEvent); ok && e.written != nil {
			waiting = append(waiting, e)
		}
	}
	for event := range a.queue {
		batch.Reset()
		waiting = waiting[:0]
		add(event)
	more:
		for batch.Len() < 64<<10 { // one write for all that waits
			select {
			case event, ok := <-a.queue:
				if !ok {
					break more
				}
				add(event)
			default:
				break more
			}
		}
		written, err := a.flush(batch.Bytes())
		if err != nil {
			a.dropped.Add(uint64(bytes.Count(batch.Bytes()[written:], []byte{'\n'})))
		}
		for i, e := range waiting {
			e.written <- err // of a batch that was cut short none counts
			waiting[i] = nil
		}
		a.note(err)
	}
	a.sayDropped()
	if a.file == nil {
		a.err = fmt.Errorf("%s: %d audit records were lost", a.opts.Path, a.dropped.Load())
		return
	}
	a.err = errors.Join(a.file.Sync(), a.file.Close())
}

// add appends event's line to batch.
func (a *Audit) add(batch *bytes.Buffer, event any) {
	enc := json.NewEncoder(batch)
	enc.SetEscapeHTML(false) // "git <- zsh" stays readable
	if err := enc.Encode(a.record(event)); err != nil {
		panic(err) // strings, numbers and times of this century only
	}
}

// note reports the change between working and failing, and afterwards what was lost.
func (a *Audit) note(err error) {
	switch {
	case err != nil && !a.failing:
		a.failing = true
		a.opts.Report(fmt.Errorf("the audit log takes no records, sessions go on without: %w", err))
	case err == nil && a.failing:
		a.failing = false
		a.opts.Report(fmt.Errorf("%s: the audit log takes records again; %d were lost", a.opts.Path, a.dropped.Load()-a.reported))
	}
	if err == nil {
		a.sayDropped()
	}
}

// sayDropped writes how many records were lost since the log last said so.
func (a *Audit) sayDropped() {
	total := a.dropped.Load()
	if total == a.reported {
		return
	}
	line, err := json.Marshal(droppedRecord{"dropped", time.Now(), total - a.reported})
	if err != nil {
		panic(err)
	}
	if _, err := a.flush(append(line, '\n')); err == nil {
		a.reported = total
	}
}

// flush appends whole lines to the log, which it opens again or rotates where needed. It returns how many bytes of lines
// the file took.
func (a *Audit) flush(lines []byte) (int, error) {
	if a.file != nil && !a.current() {
		a.file.Close() // nothing is buffered; another master has rotated the file, or somebody removed it
		a.file = nil
	}
	if a.file != nil && a.size > 0 && a.size+int64(len(lines)) > a.opts.MaxSize {
		if err := a.rotate(); err != nil {
			return 0, err
		}
	}
	if a.file == nil {
		if err := a.open(); err != nil {
			return 0, err
		}
	}
	if a.torn {
		if _, err := a.file.Write([]byte{'\n'}); err != nil {
			return 0, err
		}
		a.torn = false
	}
	n, err := a.file.Write(lines)
	if n > 0 {
		a.torn = lines[n-1] != '\n'
	}
	return n, err
}

// current reports whether the path still leads to the open file.
func (a *Audit) current() bool {
	there, err := os.Lstat(a.opts.Path)
	if err != nil {
		return false
	}
	here, err := a.file.Stat()
	if err != nil || !os.SameFile(there, here) {
		return false
	}
	a.size = here.Size() // another master of this user, on its way out, may append too
	return true
}

func (a *Audit) open() error {
	f, err := openAppend(a.opts.Path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: a.opts.Path, Err: errors.New("not a regular file; move it away")}
	}
	if err != nil {
		f.Close()
		return err
	}
	a.file, a.size, a.torn = f, st.Size(), false
	if a.size > 0 { // a line that a full disk cut short: begin a new one
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, a.size-1); err == nil {
			a.torn = last[0] != '\n'
		}
	}
	return nil
}

// rotate makes the log the old one and leaves no file open. Two masters may find the same file full: the lock on the
// file that both have open lets one rename it, and the other then sees that the path leads elsewhere.
func (a *Audit) rotate() error {
	if err := lockFile(a.file); err != nil {
		return fmt.Errorf("%s: lock: %w", a.opts.Path, err)
	}
	var err error
	if a.current() {
		if openFilesCantMove {
			a.file.Close()
			a.file = nil
		}
		err = os.Rename(a.opts.Path, a.opts.Path+".1")
	}
	if a.file != nil {
		a.file.Close() // and with it the lock
		a.file = nil
	}
	return err
}
