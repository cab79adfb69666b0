package persist

import (
	"testing"
	"time"
	_ "time/tzdata" // for a machine without zones
)

func zone(t *testing.T, name string) *time.Location {
	t.Helper()
	z, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func TestKeep(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	const layout = "2006-01-02 15:04:05 MST"
	at := func(s string) time.Time {
		t.Helper()
		d, err := time.ParseInLocation("2006-01-02 15:04", s, berlin)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for _, c := range []struct {
		name       string
		idle, max  string
		until      string
		made, left string // when the connection was made, and its last client left
		want, why  string
		end        string // when it takes no more clients; "": never
	}{
		{name: "idle", idle: "10m", max: "8h", made: "2026-11-20 09:00", left: "2026-11-20 10:00",
			want: "2026-11-20 10:10:00 CET", why: "no client for 10m", end: "2026-11-20 17:00:00 CET"},
		{name: "max first", idle: "1h30m", max: "8h", made: "2026-11-20 09:00", left: "2026-11-20 16:00",
			want: "2026-11-20 17:00:00 CET", why: "8h after its login", end: "2026-11-20 17:00:00 CET"},
		{name: "max has passed", idle: "10m", max: "90s", made: "2026-11-20 09:00", left: "2026-11-20 16:00",
			want: "2026-11-20 09:01:30 CET", why: "1m30s after its login", end: "2026-11-20 09:01:30 CET"},
		{name: "not at all", idle: "0s", max: "8h", made: "2026-11-20 09:00", left: "2026-11-20 16:00",
			want: "2026-11-20 16:00:00 CET", why: "no client for 0s", end: "2026-11-20 17:00:00 CET"},
		{name: "for ever", idle: "forever", max: "forever", made: "2026-11-20 09:00", left: "2026-11-20 16:00",
			want: never.In(berlin).Format(layout)},
		{name: "max only", idle: "forever", max: "24h", made: "2026-11-20 09:00", left: "2026-11-20 16:00",
			want: "2026-11-21 09:00:00 CET", why: "24h after its login", end: "2026-11-21 09:00:00 CET"},
		{name: "until", idle: "forever", max: "forever", until: "18:00", made: "2026-11-20 09:00", left: "2026-11-20 16:00",
			want: "2026-11-20 18:00:00 CET", why: "it is 18:00", end: "2026-11-20 18:00:00 CET"},
		{name: "until, in use over it", idle: "2h", max: "forever", until: "18:00", made: "2026-11-20 09:00", left: "2026-11-20 18:30",
			want: "2026-11-20 18:00:00 CET", why: "it is 18:00", end: "2026-11-20 18:00:00 CET"},
		{name: "until, made at that minute", idle: "forever", max: "forever", until: "18:00", made: "2026-11-20 18:00",
			left: "2026-11-20 18:01", want: "2026-11-21 18:00:00 CET", why: "it is 18:00", end: "2026-11-21 18:00:00 CET"},
		{name: "max before until", idle: "forever", max: "1h", until: "18:00", made: "2026-11-20 09:00", left: "2026-11-20 09:30",
			want: "2026-11-20 10:00:00 CET", why: "1h after its login", end: "2026-11-20 10:00:00 CET"},
		{name: "until tomorrow", idle: "12h", max: "forever", until: "08:00", made: "2026-11-20 20:00", left: "2026-11-20 23:00",
			want: "2026-11-21 08:00:00 CET", why: "it is 08:00", end: "2026-11-21 08:00:00 CET"},
		{name: "the last day of a month", idle: "forever", max: "forever", until: "08:00", made: "2026-12-31 20:00", left: "2026-12-31 23:00",
			want: "2027-01-01 08:00:00 CET", why: "it is 08:00", end: "2027-01-01 08:00:00 CET"},
		// Summer time began on 29 March 2026 at 02:00, and ended on 25 October 2026 at 03:00.
		{name: "over the beginning of summer time", idle: "forever", max: "forever", until: "18:00", made: "2026-03-28 19:00",
			left: "2026-03-28 20:00", want: "2026-03-29 18:00:00 CEST", why: "it is 18:00", end: "2026-03-29 18:00:00 CEST"},
		{name: "over its end", idle: "forever", max: "forever", until: "18:00", made: "2026-10-24 19:00",
			left: "2026-10-24 20:00", want: "2026-10-25 18:00:00 CET", why: "it is 18:00", end: "2026-10-25 18:00:00 CET"},
		{name: "a time that is left out", idle: "forever", max: "forever", until: "02:30", made: "2026-03-28 19:00",
			left: "2026-03-28 20:00", want: "2026-03-29 03:30:00 CEST", why: "it is 02:30", end: "2026-03-29 03:30:00 CEST"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := block{Idle: c.idle, Max: c.max, Until: c.until, OnSuspend: "keep", OnLock: "keep"}
			r := b.read(func(attribute, format string, args ...any) {
				t.Errorf("%s: "+format, append([]any{attribute}, args...)...)
			})
			got, why := r.keep(at(c.made), at(c.left), berlin)
			if got.In(berlin).Format(layout) != c.want || why != c.why {
				t.Errorf("kept until %s (%s), want %s (%s)", got.In(berlin).Format(layout), why, c.want, c.why)
			}
			end, _ := r.end(at(c.made), berlin)
			want := c.end
			if want == "" {
				want = never.In(berlin).Format(layout)
			}
			if end.In(berlin).Format(layout) != want {
				t.Errorf("ends %s, want %s", end.In(berlin).Format(layout), want)
			}
		})
	}
}

// Whatever the time and zone, the next one is ahead, not more than a day and a change of the clock, and shows what it should
// but where that hour is left out.
func TestNextIsNext(t *testing.T) {
	for _, name := range []string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"} {
		z := zone(t, name)
		for at := time.Date(2026, 1, 1, 0, 0, 0, 1, z); at.Year() == 2026; at = at.Add(7*time.Hour + 13*time.Minute) {
			for _, c := range []clock{{0, 0}, {2, 30}, {18, 0}, {23, 59}} {
				next := c.next(at, z)
				if wait := next.Sub(at); wait <= 0 || wait > 25*time.Hour {
					t.Fatalf("%s, %s after %s: %s", name, c, at, next)
				}
				if got := (clock{next.Hour(), next.Minute()}); got != c && c != (clock{2, 30}) {
					t.Fatalf("%s, %s after %s: %s", name, c, at, next)
				}
			}
		}
	}
}
