package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	// Registers the messages that this program does not use itself.
	_ "github.com/beamwire/beamwire/gen/go/beamwire/certificate/v1"
	_ "github.com/beamwire/beamwire/gen/go/beamwire/job/v1"
	_ "github.com/beamwire/beamwire/gen/go/beamwire/stream/v1"
)

// The bytes of every release mean the same here as in Python, which wrote them.
func TestGolden(t *testing.T) {
	paths, err := filepath.Glob("../../tests/contract/golden/*/*.binpb")
	if err != nil || len(paths) < 6 {
		t.Fatalf("golden files: %v, %v", paths, err)
	}
	for _, path := range paths {
		name := strings.TrimSuffix(path, ".binpb")
		t.Run(filepath.Base(name), func(t *testing.T) {
			if got, want := decoded(t, path), parsed(t, read(t, name+".json")); !reflect.DeepEqual(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func decoded(t *testing.T, path string) any {
	t.Helper()
	name := protoreflect.FullName(strings.TrimSuffix(filepath.Base(path), ".binpb"))
	kind, err := protoregistry.GlobalTypes.FindMessageByName(name)
	if err != nil {
		t.Fatal(err)
	}
	message := kind.New().Interface()
	if err := proto.Unmarshal(read(t, path), message); err != nil {
		t.Fatal(err)
	}
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	return parsed(t, text)
}

func parsed(t *testing.T, text []byte) any {
	t.Helper()
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		t.Fatal(err)
	}
	return value
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
