package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
)

var durationType = reflect.TypeFor[time.Duration]()

// Schema derives from a struct, or a pointer to one, what a block holds. It is nil for nil. Each exported field has a
// tag `hcl:"NAME"`, `hcl:"NAME,optional"`, `hcl:"NAME,label"` (strings, of nested blocks only) or `hcl:"NAME,block"` (a
// slice of structs: one for each block of that name). Other fields are left alone. Attributes are strings, bools, whole
// or floating numbers, time.Durations (written "90s", "10m"), slices of these but for the last, and maps from string to
// them. More tags: `default` (text of a string or duration, JSON of all else; makes it optional), `doc`, `format`
// ("clock", "path", "sha256"), `words` (what a string may be, besides what its format allows, separated by commas; `words:""`
// is the empty string), `sensitive:"true"`.
func Schema(v any) (*pluginpb.Schema, error) {
	if v == nil {
		return nil, nil
	}
	t := structType(v)
	if t == nil {
		return nil, fmt.Errorf("%T is no struct", v)
	}
	return schemaOf(t, nil)
}

func structType(v any) reflect.Type {
	t := reflect.TypeOf(v)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	return t
}

// field is a struct's field as its tags have it.
type field struct {
	index      int
	name, kind string // kind is "", "optional", "label" or "block"
	reflect.StructField
}

func fields(t reflect.Type) ([]field, error) {
	var out []field
	for i := range t.NumField() {
		f := t.Field(i)
		tag, ok := f.Tag.Lookup("hcl")
		if !ok {
			continue
		}
		name, kind, _ := strings.Cut(tag, ",")
		if !f.IsExported() || name == "" || !slices.Contains([]string{"", "optional", "label", "block"}, kind) {
			return nil, fmt.Errorf("%s.%s: bad tag hcl:%q", t, f.Name, tag)
		}
		out = append(out, field{i, name, kind, f})
	}
	return out, nil
}

func schemaOf(t reflect.Type, within []reflect.Type) (*pluginpb.Schema, error) {
	if slices.Contains(within, t) {
		return nil, fmt.Errorf("%s holds itself", t)
	}
	within = append(within, t)
	fs, err := fields(t)
	if err != nil {
		return nil, err
	}
	s := &pluginpb.Schema{}
	for _, f := range fs {
		switch f.kind {
		case "label":
			if len(within) == 1 || f.Type.Kind() != reflect.String {
				return nil, fmt.Errorf("%s.%s: only strings of nested blocks can be labels", t, f.Name)
			}
		case "block":
			if f.Type.Kind() != reflect.Slice || f.Type.Elem().Kind() != reflect.Struct {
				return nil, fmt.Errorf("%s.%s: a block has to be a slice of structs", t, f.Name)
			}
			nested, err := schemaOf(f.Type.Elem(), within)
			if err != nil {
				return nil, err
			}
			nested.Doc = f.Tag.Get("doc")
			b := &pluginpb.NestedBlock{Name: f.name, Schema: nested}
			inner, _ := fields(f.Type.Elem()) // schemaOf has looked at them
			for _, g := range inner {
				if g.kind == "label" {
					b.Labels = append(b.Labels, g.name)
				}
			}
			s.Blocks = append(s.Blocks, b)
		default:
			a, err := attribute(f)
			if err != nil {
				return nil, fmt.Errorf("%s.%s: %w", t, f.Name, err)
			}
			s.Attributes = append(s.Attributes, a)
		}
	}
	return s, nil
}

func attribute(f field) (*pluginpb.Attribute, error) {
	kind, ok := ctyType(f.Type)
	if !ok {
		return nil, fmt.Errorf("a %s can't be configured", f.Type)
	}
	a := &pluginpb.Attribute{
		Name: f.name, Type: kind, Required: f.kind == "", Doc: f.Tag.Get("doc"), Format: f.Tag.Get("format"),
		Sensitive: f.Tag.Get("sensitive") == "true",
	}
	if f.Type == durationType {
		a.Format = "duration"
	}
	if words, ok := f.Tag.Lookup("words"); ok {
		a.Words = strings.Split(words, ",")
	}
	text, ok := f.Tag.Lookup("default")
	switch {
	case ok && kind == `"string"`:
		b, err := json.Marshal(text)
		if err != nil {
			return nil, err
		}
		a.Default, a.Required = string(b), false
	case ok:
		a.Default, a.Required = text, false
	case f.Type == durationType && !a.Required:
		a.Default = `"0s"`
	}
	if a.Default != "" {
		if err := decodeValue(json.RawMessage(a.Default), reflect.New(f.Type).Elem(), nil); err != nil {
			return nil, fmt.Errorf("default %s: %w", a.Default, err)
		}
	}
	return a, nil
}

// ctyType is a type in the JSON that cty has for types.
func ctyType(t reflect.Type) (string, bool) {
	switch t.Kind() {
	case reflect.String:
		return `"string"`, true
	case reflect.Bool:
		return `"bool"`, true
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Uint, reflect.Uint8, reflect.Uint16,
		reflect.Uint32, reflect.Uint64, reflect.Float32, reflect.Float64:
		if t == durationType {
			return `"string"`, true
		}
		return `"number"`, true
	case reflect.Slice, reflect.Map:
		if t.Elem() == durationType || t.Kind() == reflect.Map && t.Key().Kind() != reflect.String {
			return "", false
		}
		elem, ok := ctyType(t.Elem())
		if t.Kind() == reflect.Map {
			return `["map",` + elem + `]`, ok
		}
		return `["list",` + elem + `]`, ok
	}
	return "", false
}

// pathError is a problem with a place in a block.
type pathError struct {
	path Path
	text string
}

func (e *pathError) Error() string { return e.text }

// decode reads a block's value into a new struct of the type of like, and returns a pointer to it; nil for a nil like.
func decode(value []byte, like any) (any, []*pathError) {
	if like == nil {
		return nil, nil
	}
	v := reflect.New(structType(like))
	return v.Interface(), decodeStruct(value, v.Elem(), nil)
}

func decodeStruct(value []byte, v reflect.Value, at Path) (bad []*pathError) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(value, &raw); err != nil {
		return []*pathError{{at, "not an object: " + err.Error()}}
	}
	fs, err := fields(v.Type())
	if err != nil {
		return []*pathError{{at, err.Error()}}
	}
	for _, f := range fs {
		r, ok := raw[f.name]
		here := append(slices.Clone(at), f.name)
		switch {
		case !ok || string(r) == "null":
			if f.kind == "" && f.Tag.Get("default") == "" {
				bad = append(bad, &pathError{here, "missing"})
			}
		case f.kind == "block":
			var list []json.RawMessage
			if err := json.Unmarshal(r, &list); err != nil {
				bad = append(bad, &pathError{here, "not a list of blocks: " + err.Error()})
				continue
			}
			slice := reflect.MakeSlice(f.Type, len(list), len(list))
			for i, item := range list {
				bad = append(bad, decodeStruct(item, slice.Index(i), append(slices.Clone(here), i))...)
			}
			v.Field(f.index).Set(slice)
		default:
			var e *pathError
			if err := decodeValue(r, v.Field(f.index), here); errors.As(err, &e) {
				bad = append(bad, e)
			} else if err != nil {
				bad = append(bad, &pathError{here, err.Error()})
			}
		}
	}
	return bad
}

func decodeValue(r json.RawMessage, v reflect.Value, at Path) error {
	switch {
	case v.Type() == durationType:
		var text string
		if err := json.Unmarshal(r, &text); err != nil {
			return &pathError{at, "not text such as \"10m\""}
		}
		if text == "" {
			return nil
		}
		d, err := time.ParseDuration(text)
		if err != nil {
			return &pathError{at, fmt.Sprintf("%q is not a duration such as \"90s\", \"10m\" or \"8h\"", text)}
		}
		v.SetInt(int64(d))
		return nil
	case v.Kind() == reflect.Slice:
		var list []json.RawMessage
		if err := json.Unmarshal(r, &list); err != nil {
			return &pathError{at, "not a list"}
		}
		v.Set(reflect.MakeSlice(v.Type(), len(list), len(list)))
		for i, item := range list {
			if err := decodeValue(item, v.Index(i), append(slices.Clone(at), i)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := json.Unmarshal(r, v.Addr().Interface()); err != nil {
		return &pathError{at, fmt.Sprintf("%s is not %s", r, article(v.Kind()))}
	}
	return nil
}

// article names what JSON can't be read into.
func article(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Map:
		return "a map"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "a whole number that fits"
}
