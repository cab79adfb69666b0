package pluginrun

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

// CallTime bounds calls that no person has a part in.
const CallTime = 5 * time.Second

// Bounds of what a plugin may declare.
const (
	maxDepth = 4
	maxNames = 256
	// maxDefault bounds an attribute's default, in bytes of JSON.
	maxDefault = 4096
)

var (
	pluginName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	schemaName = regexp.MustCompile(`^[a-z][a-z0-9_-]*$`)
)

// ValidName reports whether a plugin can have this name.
func ValidName(s string) bool { return pluginName.MatchString(s) }

// Names that the core has in the blocks of every plugin.
var (
	pluginReserved = []string{"path", "sha256", "on_failure", "may", "when"}
	hostReserved   = []string{"when"}
)

// Describe asks a plugin what it is, and checks the answer. The error lists all that is wrong, for the plugin's author.
func (p *Process) Describe(ctx context.Context) (*pluginpb.DescribeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTime)
	defer cancel()
	d, err := p.Client.Describe(ctx, &pluginpb.DescribeRequest{})
	if err != nil {
		return nil, fmt.Errorf("does not describe itself: %w", CallError(err))
	}
	return d, CheckDescription(d)
}

// CheckDescription returns what is wrong with what a plugin says of itself.
func CheckDescription(d *pluginpb.DescribeResponse) error {
	var errs []error
	if !ValidName(d.GetName()) {
		errs = append(errs, fmt.Errorf("the name %q is not made of a-z, 0-9 and -", clip(plugin.Printable(d.GetName()), 40)))
	}
	n := 0
	for _, s := range []struct {
		what     string
		schema   *pluginpb.Schema
		reserved []string
	}{{"plugin block", d.GetPlugin(), pluginReserved}, {"host block", d.GetHost(), hostReserved}} {
		errs = append(errs, checkSchema(s.schema, s.what, s.reserved, 1, &n)...)
	}
	if n > maxNames {
		errs = append(errs, fmt.Errorf("it declares %d names, at most %d", n, maxNames))
	}
	return errors.Join(errs...)
}

func checkSchema(s *pluginpb.Schema, what string, taken []string, depth int, n *int) (errs []error) {
	if depth > maxDepth {
		return []error{fmt.Errorf("%s: blocks within blocks, more than %d deep", what, maxDepth)}
	}
	seen := slices.Clone(taken)
	name := func(s string) {
		if *n++; *n > maxNames {
			return
		}
		switch {
		case !schemaName.MatchString(s):
			errs = append(errs, fmt.Errorf("%s: %q can't be a name", what, clip(plugin.Printable(s), 40)))
		case slices.Contains(seen, s):
			errs = append(errs, fmt.Errorf("%s: the name %q is taken", what, s))
		}
		seen = append(seen, s)
	}
	for _, a := range s.GetAttributes() {
		name(a.GetName())
		if _, _, err := AttributeType(a); err != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", what, clip(plugin.Printable(a.GetName()), 40), err))
		}
	}
	for _, b := range s.GetBlocks() {
		name(b.GetName())
		inner := clip(plugin.Printable(b.GetName()), 40)
		for i, label := range b.GetLabels() {
			if !schemaName.MatchString(label) || slices.Contains(b.GetLabels()[:i], label) {
				errs = append(errs, fmt.Errorf("%s: %s: %q can't be a label", what, inner, clip(plugin.Printable(label), 40)))
			}
		}
		errs = append(errs, checkSchema(b.GetSchema(), what+", "+inner, b.GetLabels(), depth+1, n)...)
	}
	return errs
}

// AttributeType returns an attribute's type and its default, which is never null: without one it is the type's empty
// value.
func AttributeType(a *pluginpb.Attribute) (cty.Type, cty.Value, error) {
	if len(a.GetType()) > 1024 {
		return cty.NilType, cty.NilVal, errors.New("its type is too long")
	}
	t, err := ctyjson.UnmarshalType([]byte(a.GetType()))
	if err != nil || !usable(t, 1) {
		return cty.NilType, cty.NilVal, fmt.Errorf("%q is no type that policy can hold", clip(plugin.Printable(a.GetType()), 80))
	}
	if a.GetDefault() == "" {
		return t, empty(t), nil
	}
	if len(a.GetDefault()) > maxDefault || !tame([]byte(a.GetDefault())) {
		return t, cty.NilVal, errors.New("its default is no JSON, too long, or has a number that is too large or too small")
	}
	v, err := ctyjson.Unmarshal([]byte(a.GetDefault()), t)
	if err != nil || v.IsNull() || !v.IsWhollyKnown() {
		return t, cty.NilVal, fmt.Errorf("its default %q is not of its type", clip(plugin.Printable(a.GetDefault()), 80))
	}
	return t, v, nil
}

// tame reports whether no number in a JSON text has an exponent of more than three digits. cty would write it out: for
// 1e99999999 that takes minutes.
func tame(text []byte) bool {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	for {
		token, err := d.Token()
		if err != nil {
			return errors.Is(err, io.EOF) // anything else is not JSON
		}
		if n, ok := token.(json.Number); ok {
			if _, exponent, ok := strings.Cut(strings.ToLower(n.String()), "e"); ok && len(strings.TrimLeft(exponent, "+-0")) > 3 {
				return false
			}
		}
	}
}

// usable leaves out what has no empty value, or no form in JSON.
func usable(t cty.Type, depth int) bool {
	switch {
	case depth > maxDepth:
		return false
	case t.IsPrimitiveType():
		return true
	case t.IsListType(), t.IsSetType(), t.IsMapType():
		return usable(t.ElementType(), depth+1)
	}
	return false
}

func empty(t cty.Type) cty.Value {
	switch {
	case t == cty.String:
		return cty.StringVal("")
	case t == cty.Number:
		return cty.Zero
	case t == cty.Bool:
		return cty.False
	case t.IsListType():
		return cty.ListValEmpty(t.ElementType())
	case t.IsSetType():
		return cty.SetValEmpty(t.ElementType())
	}
	return cty.MapValEmpty(t.ElementType())
}
