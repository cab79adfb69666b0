//go:build linux

package main

import "context"

// benchCase is something to measure. Its function makes worlds as it needs them, ends them, and adds its results to
// b.report; an error says why the rest of it could not be measured.
type benchCase struct {
	name  string // for --cases
	about string
	run   func(ctx context.Context, b *bench) error
}

// cases are all there are, in the order in which they run.
var cases = []benchCase{
	{"shared", "ssh host true over a shared connection, at 0, 20 and 100 ms round trip", shared},
	{"first", "the first connection to a host, at 0, 20 and 100 ms round trip", first},
	{"bridge", "what starting a bridge costs", bridgeOwn},
	{"bulk", "one large stream each way on loopback, and the processor time for it", bulk},
	{"bulklink", "the same at 1 Gbit/s and 20 ms", bulkLink},
	{"git", "git fetch of a small repository at 50 ms", gitFetch},
	{"rsync", "rsync of many small files at 20 ms", rsyncSmall},
	{"echo", "typing beside a download, an upload and an scp at 20 Mbit/s and 40 ms", echo},
	{"judged", "what a plugin that is asked adds to a shared command", judged},
	{"dialled", "a plugin's stream through a connection, each way, beside ssh -L", dialled},
	{"forward", "streams through the plugin forward, each way, beside ssh -L and ssh -D, and the plugin's processor time", standing},
	{"atonce", "many ssh at once, where the server allows 10 sessions per connection", atOnce},
	{"memory", "memory of master and bridge, by number of clients", memory},
	{"growth", "time and memory per client, with few and with many", growth},
}
