package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"

	"google.golang.org/protobuf/encoding/protojson"

	requestv1 "github.com/beamwire/beamwire/gen/go/beamwire/request/v1"
)

const help = `Usage: transfer --address HOST:PORT --credentials DIR [--request FILE]

Creates a transfer and watches it to its end. Prints one line of JSON for each state, and the receipt last.
Exits with 0 if the transfer succeeded, 1 if it did not, 2 if it could not be understood what to do.
Ctrl-C cancels the transfer.

  --address HOST:PORT   where the facility answers
  --credentials DIR     the directory with key.pem, chain.pem and bundle.pem of an enrolled user
  --request FILE        a beamwire.request.v1.Transfer as JSON; 32 synthetic events if left out
  --help                this text
`

const synthetic = `{
  "config": {
    "event_source": {
      "type": "SyntheticEventSource",
      "parameters": {"number_of_events": 32, "shape": [64, 64]}
    },
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "parameters": {"batch_size": 8}}]
  }
}`

// options is what the command line asks for.
type options struct {
	address     string
	credentials string
	request     string
}

// parseOptions reads the arguments after the program's name; flag.ErrHelp if help was asked for.
func parseOptions(arguments []string) (options, error) {
	var parsed options
	flags := flag.NewFlagSet("transfer", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&parsed.address, "address", "", "")
	flags.StringVar(&parsed.credentials, "credentials", "", "")
	flags.StringVar(&parsed.request, "request", "", "")
	if err := flags.Parse(arguments); err != nil {
		return options{}, err
	}
	if flags.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %s", flags.Arg(0))
	}
	if parsed.address == "" || parsed.credentials == "" {
		return options{}, errors.New("--address and --credentials are needed")
	}
	if host, port, err := net.SplitHostPort(parsed.address); err != nil || host == "" || port == "" {
		return options{}, fmt.Errorf("--address must be host:port, not %s", parsed.address)
	}
	return parsed, nil
}

// loadTransfer reads a transfer as JSON, fields spelled as in the contract or in camelCase; without a file it is a
// small synthetic one.
func loadTransfer(path string) (*requestv1.Transfer, error) {
	text, err := []byte(synthetic), error(nil)
	if path != "" {
		if text, err = os.ReadFile(path); err != nil {
			return nil, err
		}
	}
	transfer := &requestv1.Transfer{}
	if err := protojson.Unmarshal(text, transfer); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return transfer, nil
}
