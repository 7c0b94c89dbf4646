package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	streamv1 "github.com/beamwire/beamwire/gen/go/beamwire/stream/v1"
)

const vectors = "../../tests/vectors/"

type vector struct {
	File, Is       string
	Good           bool
	Header, Signal map[string]any
	// Those that a reader must know, or refuse the frame.
	Codecs []string
	Steps  []struct {
		Is   string
		Size int
	}
}

// Every vector is read, or refused, as its index says.
func TestVectors(t *testing.T) {
	var index []vector
	if err := json.Unmarshal(read(t, vectors+"index.json"), &index); err != nil || len(index) < 50 {
		t.Fatalf("%d vectors: %v", len(index), err)
	}
	for _, v := range index {
		t.Run(v.File, func(t *testing.T) {
			message := read(t, vectors+v.File)
			err := v.check(t, message)
			if v.Codecs != nil {
				if err == nil || !strings.Contains(err.Error(), "codec CODEC_"+strings.ToUpper(v.Codecs[0])) {
					t.Errorf("should be refused for its codec: %v", err)
				}
				return
			}
			if (err == nil) != v.Good {
				t.Errorf("should be good: %v; %v", v.Good, err)
			}
		})
	}
}

func (v vector) check(t *testing.T, message []byte) error {
	switch v.Is {
	case "signal":
		signal, err := readSignal(message)
		if err == nil {
			same(t, signal, v.Signal)
		}
		return err
	case "frame":
		f, err := readFrame(message)
		if err == nil {
			same(t, f.header, v.Header)
		}
		return err
	}
	for _, step := range v.Steps {
		if step.Is != "greeting" {
			if length := binary.BigEndian.Uint64(message); length != uint64(step.Size) {
				t.Fatalf("a message of %d bytes, not %d", length, step.Size)
			}
			message = message[8:]
		}
		if err := (vector{Is: step.Is}).checkStep(message[:step.Size]); err != nil {
			return err
		}
		message = message[step.Size:]
	}
	if len(message) > 0 {
		return errors.New("something is left")
	}
	return nil
}

func (v vector) checkStep(message []byte) (err error) {
	switch v.Is {
	case "frame":
		_, err = readFrame(message)
	case "signal":
		_, err = readSignal(message)
	case "greeting":
		if string(message[:5]) != "\x00SP\x00\x00" || string(message[6:]) != "\x00\x00" {
			err = errors.New("it is no greeting")
		}
	}
	return err
}

func readSignal(message []byte) (*streamv1.Signal, error) {
	if len(message) < 4 || string(message[:4]) != "BWSG" {
		return nil, errors.New("it is no signal")
	}
	signal := &streamv1.Signal{}
	return signal, proto.Unmarshal(message[4:], signal)
}

func same(t *testing.T, message proto.Message, want map[string]any) {
	t.Helper()
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	if got := parsed(t, text); !reflect.DeepEqual(got, any(want)) {
		t.Errorf("got %v, want %v", got, want)
	}
}
