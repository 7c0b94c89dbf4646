// Command transfer creates a Beamwire transfer, watches it to its end, and cancels it on Ctrl-C.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	requestv1 "github.com/beamwire/beamwire/gen/go/beamwire/request/v1"
)

const (
	succeeded = 0
	failed    = 1
	misused   = 2
)

// line is one line of what is printed.
type line struct {
	Transfer      string          `json:"transfer,omitempty"`
	State         string          `json:"state,omitempty"`
	ConnectString string          `json:"connect_string,omitempty"`
	Error         *problem        `json:"error,omitempty"`
	Receipt       json.RawMessage `json:"receipt,omitempty"`
}

// printer writes lines of JSON.
type printer struct{ encoder *json.Encoder }

func newPrinter(out io.Writer) printer {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return printer{encoder}
}

func (p printer) state(transfer *requestv1.Transfer) error {
	return p.encoder.Encode(line{
		Transfer:      transfer.GetName(),
		State:         strings.TrimPrefix(transfer.GetState().String(), "STATE_"),
		ConnectString: transfer.GetConnectString(),
	})
}

func (p printer) problem(failure *status.Status) error {
	found := problemOf(failure)
	return p.encoder.Encode(line{Error: &found})
}

func (p printer) end(transfer *requestv1.Transfer) error {
	if transfer.GetError() != nil {
		if err := p.problem(status.FromProto(transfer.GetError())); err != nil {
			return err
		}
	}
	if transfer.GetReceipt() == nil {
		return nil
	}
	receipt, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(transfer.GetReceipt())
	if err != nil {
		return err
	}
	return p.encoder.Encode(line{Receipt: receipt})
}

// follow creates the transfer and stays with it to its end; a signal cancels the transfer.
func follow(interrupted context.Context, client requestv1.RequestServiceClient, wanted *requestv1.Transfer, out printer) (bool, error) {
	ctx := context.Background()
	created, err := createTransfer(ctx, client, wanted)
	if err != nil {
		return false, err
	}
	stop := context.AfterFunc(interrupted, func() {
		// The next Ctrl-C ends the program at once.
		signal.Reset(os.Interrupt)
		if err := cancelTransfer(ctx, client, created.GetName()); err != nil {
			_ = out.problem(status.Convert(err))
		}
	})
	defer stop()
	following := &watch{client: client, name: created.GetName(), report: out.state}
	last, err := following.toEnd(ctx)
	if err != nil {
		return false, err
	}
	return last.GetState() == requestv1.Transfer_STATE_SUCCEEDED, out.end(last)
}

// dial opens a channel to a facility over mutual TLS; it connects at the first call.
func dial(address, directory string) (*grpc.ClientConn, error) {
	settings, err := loadTLS(directory)
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(
		address,
		grpc.WithTransportCredentials(credentials.NewTLS(settings)),
		grpc.WithDefaultServiceConfig(requestv1.RequestServiceConfig),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
	)
}

func run(arguments []string, stdout, stderr io.Writer) int {
	asked, err := parseOptions(arguments)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, help)
		return succeeded
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return misused
	}
	wanted, err := loadTransfer(asked.request)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return misused
	}
	channel, err := dial(asked.address, asked.credentials)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return misused
	}
	defer channel.Close()
	interrupted, done := signal.NotifyContext(context.Background(), os.Interrupt)
	defer done()
	out := newPrinter(stdout)
	good, err := follow(interrupted, requestv1.NewRequestServiceClient(channel), wanted, out)
	if err != nil {
		_ = out.problem(status.Convert(err))
	}
	if err != nil || !good {
		return failed
	}
	return succeeded
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}
