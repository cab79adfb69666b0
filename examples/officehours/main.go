// Command officehours is a plugin of muxproxy that denies uses outside of office hours.
package main

import (
	"context"
	"fmt"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// hours is an `officehours` block.
type hours struct {
	From  string   `hcl:"from,optional" default:"08:00" format:"clock" doc:"when the day begins"`
	To    string   `hcl:"to,optional" default:"18:00" format:"clock" doc:"when it is over"`
	Kinds []string `hcl:"kinds,optional" doc:"kinds of use that are judged; none: all"`
}

type officeHours struct{ now func() time.Time }

func (officeHours) Describe() plugin.Info {
	return plugin.Info{Name: "officehours", Version: "1.0", Host: hours{}}
}

func (officeHours) Configure(_ context.Context, c *plugin.Config) (ds plugin.Diagnostics) {
	for _, b := range c.Hosts {
		if h := b.Value.(*hours); h.From >= h.To {
			ds = append(ds, b.Errorf(plugin.Path{"to"}, "the day is over at %s, before it begins at %s", h.To, h.From))
		}
	}
	return ds
}

func (o officeHours) Authorize(_ context.Context, r *plugin.Request) plugin.Decision {
	h := r.Block.(*hours)
	judged := len(h.Kinds) == 0
	for _, k := range h.Kinds {
		judged = judged || k == r.Use.Kind
	}
	if now := o.now().Format("15:04"); judged && (now < h.From || now >= h.To) {
		return plugin.Deny(fmt.Sprintf("it is %s", now), fmt.Sprintf("come back between %s and %s", h.From, h.To))
	}
	return plugin.NoOpinion()
}

func main() { plugin.Serve(officeHours{time.Now}) }
