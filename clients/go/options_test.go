package main

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseOptions(t *testing.T) {
	parsed, err := parseOptions([]string{"--address", "[::1]:7443", "--credentials", "alice", "--request", "r.json"})
	if err != nil {
		t.Fatal(err)
	}
	if parsed != (options{address: "[::1]:7443", credentials: "alice", request: "r.json"}) {
		t.Errorf("got %+v", parsed)
	}
	if _, err := parseOptions([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("help: got %v", err)
	}
}

func TestParseOptionsRefuses(t *testing.T) {
	for wrong, arguments := range map[string][]string{
		"nothing at all":       {},
		"no credentials":       {"--address", "localhost:7443"},
		"no port":              {"--address", "localhost", "--credentials", "alice"},
		"a URL":                {"--address", "https://localhost:7443/", "--credentials", "alice"},
		"a misspelt option":    {"--address", "localhost:7443", "--credentials", "alice", "--requst", "r.json"},
		"an argument too many": {"--address", "localhost:7443", "--credentials", "alice", "r.json"},
	} {
		if parsed, err := parseOptions(arguments); err == nil {
			t.Errorf("%s: got %+v", wrong, parsed)
		}
	}
}

func TestLoadTransferWithoutAFile(t *testing.T) {
	transfer, err := loadTransfer("")
	if err != nil {
		t.Fatal(err)
	}
	source := transfer.GetConfig().GetEventSource()
	if source.GetType() != "SyntheticEventSource" || source.GetParameters().AsMap()["number_of_events"] != 32.0 {
		t.Errorf("got %v", source)
	}
}

func TestLoadTransferFromAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "request.json")
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"process_count": 2, "config": {"maxEventCount": "9007199254740993"}, "lease": "90s"}`)
	transfer, err := loadTransfer(path)
	if err != nil {
		t.Fatal(err)
	}
	if transfer.GetProcessCount() != 2 || transfer.GetConfig().GetMaxEventCount() != 9007199254740993 {
		t.Errorf("got %v", transfer)
	}
	for _, text := range []string{`process_count: 2`, `{"procces_count": 2}`, `{"process_count": "two"}`} {
		write(text)
		if _, err := loadTransfer(path); err == nil || !strings.HasPrefix(err.Error(), path) {
			t.Errorf("%s: got %v", text, err)
		}
	}
}
