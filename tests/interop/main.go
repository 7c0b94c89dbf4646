// Command interop sends a stream to a cache, or receives one from it, through mangos.
//
//	interop push URL FRAMES [CREDENTIALS]    sends, says "sent", and stays until its input ends
//	interop pull URL [CREDENTIALS]           prints each frame as a line of JSON, up to END
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"go.nanomsg.org/mangos/v3"
	"go.nanomsg.org/mangos/v3/protocol/pull"
	"go.nanomsg.org/mangos/v3/protocol/push"
	_ "go.nanomsg.org/mangos/v3/transport/tcp"
	_ "go.nanomsg.org/mangos/v3/transport/tlstcp"

	commonv1 "github.com/beamwire/beamwire/gen/go/beamwire/common/v1"
	streamv1 "github.com/beamwire/beamwire/gen/go/beamwire/stream/v1"
)

const (
	timeout = 30 * time.Second
	values  = 1000
)

// line is what is printed of a frame.
type line struct {
	Kind     string   `json:"kind"`
	Producer uint32   `json:"producer"`
	Sequence uint64   `json:"sequence"`
	Events   []uint64 `json:"events"`
	Sum      uint64   `json:"sum"`
}

func loadTLS(directory, host string) (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(filepath.Join(directory, "chain.pem"), filepath.Join(directory, "key.pem"))
	if err != nil {
		return nil, err
	}
	bundle, err := os.ReadFile(filepath.Join(directory, "bundle.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundle) {
		return nil, errors.New("no certificate in bundle.pem")
	}
	return &tls.Config{
		Certificates: []tls.Certificate{certificate},
		RootCAs:      roots,
		ServerName:   host,
		MinVersion:   tls.VersionTLS12,
	}, nil
}

// dial connects a socket to a cache, over TLS if there are credentials.
func dial(socket mangos.Socket, address, credentials string) error {
	options := map[string]any{mangos.OptionReconnectTime: timeout}
	if credentials != "" {
		parsed, err := url.Parse(address)
		if err != nil {
			return err
		}
		if options[mangos.OptionTLSConfig], err = loadTLS(credentials, parsed.Hostname()); err != nil {
			return err
		}
	}
	return socket.DialOptions(address, options)
}

// data makes the frame of one event: an array `x` of shape (1, values), uint64, filled with the sequence.
func data(sequence uint64) ([]byte, error) {
	payload := make([]byte, 8*values)
	for place := range values {
		binary.LittleEndian.PutUint64(payload[8*place:], sequence)
	}
	array := &streamv1.Array{Name: "x", Dtype: "<u8", Shape: []uint64{1, values}, SizeBytes: uint64(len(payload))}
	return encode(&streamv1.FrameHeader{
		Epoch:      1,
		Sequence:   sequence,
		Kind:       streamv1.FrameKind_FRAME_KIND_DATA,
		EventCount: 1,
		EventIds:   []uint64{sequence},
		Arrays:     []*streamv1.Array{array},
	}, payload)
}

func send(socket mangos.Socket, count uint64) error {
	header := &streamv1.FrameHeader{Epoch: 1, Kind: streamv1.FrameKind_FRAME_KIND_HEADER}
	header.Stream = &streamv1.StreamHeader{Buffer: "buffers/b0", ProducerCount: 1}
	end := &streamv1.FrameHeader{Epoch: 1, Sequence: count + 1, Kind: streamv1.FrameKind_FRAME_KIND_END}
	end.End = &streamv1.StreamEnd{
		Cause:              commonv1.EndCause_END_CAUSE_DONE,
		SelectedEventCount: count,
		SentEventCount:     count,
		SentFrameCount:     count,
	}
	for sequence := range count + 2 {
		var frame []byte
		var err error
		switch sequence {
		case 0:
			frame, err = encode(header, nil)
		case count + 1:
			frame, err = encode(end, nil)
		default:
			frame, err = data(sequence)
		}
		if err != nil {
			return err
		}
		if err := socket.Send(frame); err != nil {
			return err
		}
	}
	return nil
}

func runPush(address, frames, credentials string) error {
	count, err := strconv.ParseUint(frames, 10, 32)
	if err != nil {
		return err
	}
	socket, err := push.NewSocket()
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := socket.SetOption(mangos.OptionSendDeadline, timeout); err != nil {
		return err
	}
	if err := dial(socket, address, credentials); err != nil {
		return err
	}
	if err := send(socket, count); err != nil {
		return err
	}
	fmt.Println("sent")
	// mangos forgets what it has queued when it is closed.
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// sum adds up the values of the first array.
func sum(payload []byte) uint64 {
	var total uint64
	for ; len(payload) >= 8; payload = payload[8:] {
		total += binary.LittleEndian.Uint64(payload)
	}
	return total
}

func runPull(address, credentials string) error {
	socket, err := pull.NewSocket()
	if err != nil {
		return err
	}
	defer socket.Close()
	closed := make(chan struct{}, 1)
	socket.SetPipeEventHook(func(event mangos.PipeEvent, _ mangos.Pipe) {
		if event == mangos.PipeEventDetached {
			closed <- struct{}{}
		}
	})
	if err := socket.SetOption(mangos.OptionRecvDeadline, timeout); err != nil {
		return err
	}
	if err := dial(socket, address, credentials); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	for {
		message, err := socket.Recv()
		if err != nil {
			return err
		}
		ended, err := show(out, message)
		if err != nil {
			return err
		}
		if ended {
			// The cache closes, the socket answers by closing its pipe: that tells the cache that all has been read.
			<-closed
			return nil
		}
	}
}

// show prints the frames of a message; true if it was the END.
func show(out *json.Encoder, message []byte) (bool, error) {
	header, payload, err := decode(message)
	if err != nil {
		return false, err
	}
	frames, err := split(message, header, payload)
	if err != nil {
		return false, err
	}
	for _, frame := range frames {
		header, payload, err := decode(frame)
		if err != nil {
			return false, err
		}
		if err := out.Encode(line{
			Kind:     header.GetKind().String(),
			Producer: header.GetProducer(),
			Sequence: header.GetSequence(),
			Events:   header.GetEventIds(),
			Sum:      sum(payload),
		}); err != nil {
			return false, err
		}
	}
	return header.GetKind() == streamv1.FrameKind_FRAME_KIND_END, nil
}

func run(arguments []string) error {
	credentials := func(place int) string {
		if len(arguments) > place {
			return arguments[place]
		}
		return ""
	}
	switch {
	case len(arguments) >= 3 && arguments[0] == "push":
		return runPush(arguments[1], arguments[2], credentials(3))
	case len(arguments) >= 2 && arguments[0] == "pull":
		return runPull(arguments[1], credentials(2))
	}
	return errors.New("say push URL FRAMES [CREDENTIALS] or pull URL [CREDENTIALS]")
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
