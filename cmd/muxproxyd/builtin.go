package main

import (
	"maps"
	"slices"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/plugins/confirm"
	"github.com/muxproxy/muxproxy/plugins/forward"
	"github.com/muxproxy/muxproxy/plugins/persist"
)

// builtIns are the plugins that this program is when it is started as "muxproxyd plugin NAME" by a master.
var builtIns = map[string]func() plugin.Plugin{
	"confirm": confirm.New,
	"forward": forward.New,
	"persist": persist.New,
}

// builtInNames are their names, sorted.
func builtInNames() []string { return slices.Sorted(maps.Keys(builtIns)) }

// servePlugin is the program if its arguments say that it is a plugin; else it returns. Signals stay as they are: a plugin
// ends when its standard input does.
func servePlugin(args []string) {
	if len(args) == 2 && args[0] == "plugin" {
		if construct := builtIns[args[1]]; construct != nil {
			plugin.Serve(construct())
		}
	}
}
