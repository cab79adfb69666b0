package plugin

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
)

type sample struct {
	Text   string            `hcl:"text" words:"a,b" sensitive:"true" doc:"what"`
	Clock  string            `hcl:"clock,optional" default:"08:00" format:"clock" words:""`
	Wait   time.Duration     `hcl:"wait,optional"`
	Port   uint16            `hcl:"port,optional" default:"22"`
	On     bool              `hcl:"on,optional"`
	Ratio  float64           `hcl:"ratio,optional"`
	List   []string          `hcl:"list,optional" default:"[\"x\"]"`
	Map    map[string]string `hcl:"map,optional"`
	Inner  []inner           `hcl:"inner,block" doc:"many"`
	hidden int
	Other  int
}

type inner struct {
	Name string   `hcl:"name,label"`
	Kind string   `hcl:"kind,label"`
	N    []int    `hcl:"n,optional"`
	Deep []deeper `hcl:"deep,block"`
}

type deeper struct {
	Wait time.Duration `hcl:"wait"`
}

func TestSchema(t *testing.T) {
	_ = sample{hidden: 1}
	for _, v := range []any{sample{}, &sample{}} {
		s, err := Schema(v)
		if err != nil {
			t.Fatal(err)
		}
		b, err := protojson.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var got, want any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(`{"attributes":[
			{"name":"text","type":"\"string\"","required":true,"doc":"what","sensitive":true,"words":["a","b"]},
			{"name":"clock","type":"\"string\"","default":"\"08:00\"","format":"clock","words":[""]},
			{"name":"wait","type":"\"string\"","default":"\"0s\"","format":"duration"},
			{"name":"port","type":"\"number\"","default":"22"},
			{"name":"on","type":"\"bool\""},
			{"name":"ratio","type":"\"number\""},
			{"name":"list","type":"[\"list\",\"string\"]","default":"[\"x\"]"},
			{"name":"map","type":"[\"map\",\"string\"]"}],
			"blocks":[{"name":"inner","labels":["name","kind"],"schema":{"doc":"many",
				"attributes":[{"name":"n","type":"[\"list\",\"number\"]"}],
				"blocks":[{"name":"deep","schema":{"attributes":[
					{"name":"wait","type":"\"string\"","required":true,"format":"duration"}]}}]}}]}`), &want); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s", b)
		}
	}
	if s, err := Schema(nil); s != nil || err != nil {
		t.Errorf("nil: %v, %v", s, err)
	}
	type self struct {
		Self []sample `hcl:"self,block"`
	}
	if _, err := Schema(self{}); err != nil {
		t.Error(err)
	}
	for want, v := range map[string]any{
		"is no struct": "text",
		"bad tag": struct {
			A string `hcl:",optional"`
		}{},
		"can't be configured": struct {
			A chan int `hcl:"a"`
		}{},
		"has to be a slice": struct {
			A inner `hcl:"a,block"`
		}{},
		"can be labels": struct {
			A string `hcl:"a,label"`
		}{},
		"default soon": struct {
			A bool `hcl:"a" default:"soon"`
		}{},
		`default "soon"`: struct {
			A time.Duration `hcl:"a" default:"soon"`
		}{},
		"holds itself": recursive{},
		"a []time.Duration can't be": struct {
			A []time.Duration `hcl:"a"`
		}{},
	} {
		if _, err := Schema(v); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%T: %v, want %q", v, err, want)
		}
	}
}

type recursive struct {
	R []recursive `hcl:"r,block"`
}

func TestDecode(t *testing.T) {
	v, bad := decode([]byte(`{"text":"a","wait":"90s","port":22,"list":["x","y"],"map":{"k":"v"},"unknown":1,
		"inner":[{"name":"n","kind":"k","n":[1,2],"deep":[{"wait":"1h"}]}]}`), sample{})
	want := &sample{Text: "a", Wait: 90 * time.Second, Port: 22, List: []string{"x", "y"}, Map: map[string]string{"k": "v"},
		Inner: []inner{{Name: "n", Kind: "k", N: []int{1, 2}, Deep: []deeper{{time.Hour}}}}}
	if len(bad) > 0 || !reflect.DeepEqual(v, want) {
		t.Errorf("%+v, %v", v, bad)
	}
	_, bad = decode([]byte(`{"wait":"soon","port":65536,"on":"yes","list":[1],"map":3,
		"inner":[{},{"n":[1,2.5],"deep":[{"wait":"1h"},{}]}]}`), &sample{})
	got := map[string]string{}
	for _, e := range bad {
		b, err := json.Marshal(e.path)
		if err != nil {
			t.Fatal(err)
		}
		got[string(b)] = e.text
	}
	if !reflect.DeepEqual(got, map[string]string{
		`["text"]`:                    "missing",
		`["wait"]`:                    `"soon" is not a duration such as "90s", "10m" or "8h"`,
		`["port"]`:                    "65536 is not a whole number that fits",
		`["on"]`:                      `"yes" is not true or false`,
		`["list",0]`:                  "1 is not a string",
		`["map"]`:                     "3 is not a map",
		`["inner",1,"n",1]`:           "2.5 is not a whole number that fits",
		`["inner",1,"deep",1,"wait"]`: "missing",
	}) {
		t.Errorf("%v", got)
	}
}

// What a master sends is read or complained about.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{`{}`, `null`, `[]`, `{"text":null}`, `{"inner":[null]}`, `{"inner":{}}`, `{"map":{"a":null}}`, `{"list":null}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		v, bad := decode(value, sample{})
		if _, ok := v.(*sample); !ok {
			t.Errorf("%T", v)
		}
		if !json.Valid(value) && len(bad) == 0 {
			t.Error("no JSON, no complaint")
		}
	})
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		`a "b" c\d`: `a "b" c\\d`, "x\x1b[2J\n": `x\x1b[2J\n`, "\u202eevil": `\u202eevil`, "grün": "grün", "\xff": `\xff`,
	} {
		if got := Printable(in); got != want {
			t.Errorf("%q: %s", in, got)
		}
	}
}
