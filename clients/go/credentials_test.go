package main

import (
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
)

func certificate(t *testing.T, names ...string) *x509.Certificate {
	t.Helper()
	made := &x509.Certificate{}
	for _, name := range names {
		parsed, err := url.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		made.URIs = append(made.URIs, parsed)
	}
	return made
}

func TestCheckService(t *testing.T) {
	if err := checkService(certificate(t, "spiffe://facility.test/service/request"), "facility.test"); err != nil {
		t.Error(err)
	}
	for wrong, names := range map[string][]string{
		"another trust domain": {"spiffe://other.test/service/request"},
		"no service":           {"spiffe://facility.test/user/mallory"},
		"no SPIFFE id":         {"https://facility.test/service/request"},
		"no URI":               {},
		"two URIs":             {"spiffe://facility.test/service/a", "spiffe://facility.test/service/b"},
	} {
		if err := checkService(certificate(t, names...), "facility.test"); err == nil {
			t.Errorf("%s was believed", wrong)
		}
	}
}

func TestLoadTLSSaysWhatToDo(t *testing.T) {
	if _, err := loadTLS(t.TempDir()); err == nil || !strings.Contains(err.Error(), "enrol first") {
		t.Errorf("got %v", err)
	}
}
