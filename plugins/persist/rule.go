package persist

import (
	"fmt"
	"strings"
	"time"
)

// block is what stands in a host block: persist { ... }
type block struct {
	Idle      string `hcl:"idle,optional" default:"10m" format:"duration" words:"forever" doc:"how long a connection without clients is kept"`
	Max       string `hcl:"max,optional" default:"8h" format:"duration" words:"forever" doc:"how long after its login it takes clients and is kept"`
	Until     string `hcl:"until,optional" format:"clock" words:"" doc:"time of the day after which it takes no clients and is not kept"`
	Prewarm   bool   `hcl:"prewarm,optional" doc:"connect when the master starts"`
	Reconnect bool   `hcl:"reconnect,optional" doc:"connect again when the connection is lost"`
	OnSuspend string `hcl:"on_suspend,optional" default:"keep" words:"keep,close" doc:"whether it is kept while the machine sleeps"`
	OnLock    string `hcl:"on_lock,optional" default:"keep" words:"keep,close" doc:"whether it is kept while muxproxy is locked"`
}

// forever is a duration without an end.
const forever = time.Duration(-1)

// rule is a block as it is applied.
type rule struct {
	idle, max                time.Duration // or forever
	until                    *clock        // nil: none
	prewarm, reconnect       bool
	closeAsleep, closeLocked bool
}

// clock is a time of the day.
type clock struct{ hour, minute int }

func (c clock) String() string { return fmt.Sprintf("%02d:%02d", c.hour, c.minute) }

// read makes the rule of a block, and tells bad of each attribute that can't be read.
func (b *block) read(bad func(attribute, format string, args ...any)) rule {
	r := rule{prewarm: b.Prewarm, reconnect: b.Reconnect}
	duration := func(name, text string) time.Duration {
		if text == "forever" {
			return forever
		}
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 {
			bad(name, "%q is neither a duration such as \"10m\" or \"8h\" nor \"forever\"", text)
		}
		return d
	}
	r.idle, r.max = duration("idle", b.Idle), duration("max", b.Max)
	if b.Until != "" {
		t, err := time.Parse("15:04", b.Until)
		if err != nil || len(b.Until) != len("15:04") {
			bad("until", "%q is not a time of the day such as \"18:00\"", b.Until)
		}
		r.until = &clock{t.Hour(), t.Minute()}
	}
	closes := func(name, word string) bool {
		if word != "keep" && word != "close" {
			bad(name, "%q is neither \"keep\" nor \"close\"", word)
		}
		return word == "close"
	}
	r.closeAsleep, r.closeLocked = closes("on_suspend", b.OnSuspend), closes("on_lock", b.OnLock)
	return r
}

// ruleOf is the rule of the block that holds for a connection; nil if there is none.
func ruleOf(value any) *rule {
	b, ok := value.(*block)
	if !ok {
		return nil
	}
	r := b.read(func(string, string, ...any) {}) // Configure has looked at them
	return &r
}

// never is the time of what has no end. A master waits for it like for any other.
var never = time.Date(9999, time.December, 31, 0, 0, 0, 0, time.UTC)

// wall is the time by the wall clock alone, which goes on while the machine sleeps: all times here are of that.
func wall() time.Time { return time.Now().Round(0) }

// short is a duration without the parts that are zero at its end: 10m, not 10m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// end is when a connection that was made at since takes no more clients and is not kept, and why then.
func (r *rule) end(since time.Time, zone *time.Location) (time.Time, string) {
	at, why := never, ""
	if r.max != forever {
		at, why = since.Add(r.max), short(r.max)+" after its login"
	}
	if r.until != nil {
		if t := r.until.next(since, zone); t.Before(at) {
			at, why = t, "it is "+r.until.String()
		}
	}
	return at, why
}

// keep is how long a connection stays that was made at since and has no clients since idle, and why no longer.
func (r *rule) keep(since, idle time.Time, zone *time.Location) (time.Time, string) {
	at, why := r.end(since, zone)
	if r.idle != forever {
		if t := idle.Add(r.idle); t.Before(at) {
			at, why = t, "no client for "+short(r.idle)
		}
	}
	return at, why
}

// next is the first time after t at which clocks in the zone show c. Where the hour is left out that day it is what shows
// instead, and where it comes twice it is one of the two: see time.Date.
func (c clock) next(t time.Time, zone *time.Location) time.Time {
	t = t.In(zone)
	for day := 0; ; day++ {
		if at := time.Date(t.Year(), t.Month(), t.Day()+day, c.hour, c.minute, 0, 0, zone); at.After(t) {
			return at
		}
	}
}
