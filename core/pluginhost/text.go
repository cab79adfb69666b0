package pluginhost

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"github.com/muxproxy/muxproxy/core/use"
)

// utf8 makes a protobuf string of any text.
func utf8(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// clip bounds what a plugin says.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}

const maxLines = 100 // a second, of one plugin's log

// lineLog writes a plugin's standard error to the master's log. It is used by one goroutine.
type lineLog struct {
	log    zerolog.Logger
	second time.Time
	n      int // lines in this second
}

// line takes a line of any kind. A JSON object with a level and a message, in zerolog's or hclog's names, keeps them, but
// no plugin logs anything worse than an error.
func (l *lineLog) line(text string) {
	if now := time.Now().Truncate(time.Second); !now.Equal(l.second) {
		if l.n > maxLines {
			l.log.Warn().Int("lines", l.n-maxLines).Msg("the plugin logs too much: lines were dropped")
		}
		l.second, l.n = now, 0
	}
	if l.n++; l.n > maxLines || strings.TrimSpace(text) == "" {
		return
	}
	level := zerolog.InfoLevel
	var fields map[string]any
	if strings.HasPrefix(text, "{") && json.Unmarshal([]byte(text), &fields) == nil {
		take := func(names ...string) (string, bool) {
			for _, name := range names {
				if s, ok := fields[name].(string); ok {
					delete(fields, name)
					return s, true
				}
			}
			return "", false
		}
		name, _ := take("level", "@level")
		if n, err := zerolog.ParseLevel(name); err == nil && name != "" {
			level = min(n, zerolog.ErrorLevel)
		}
		take("time", "@timestamp")
		if message, ok := take("message", "@message"); ok {
			text = message
			if len(fields) > 0 {
				if rest, err := json.Marshal(fields); err == nil {
					text += " " + string(rest)
				}
			}
		}
	}
	l.log.WithLevel(level).Msg(use.Printable(text))
}
