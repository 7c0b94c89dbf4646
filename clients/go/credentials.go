package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// loadTLS makes the TLS settings of an enrolled member from key.pem, chain.pem and bundle.pem of a directory. Only a
// service of the member's own trust domain is believed.
func loadTLS(directory string) (*tls.Config, error) {
	chain := filepath.Join(directory, "chain.pem")
	certificate, err := tls.LoadX509KeyPair(chain, filepath.Join(directory, "key.pem"))
	if err != nil {
		return nil, fmt.Errorf("%w; enrol first", err)
	}
	own, err := spiffeID(certificate.Leaf)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", chain, err)
	}
	if end := certificate.Leaf.NotAfter; time.Now().After(end) {
		return nil, fmt.Errorf("the certificate of %s ended %s; renew it, or enrol again", own, end)
	}
	bundle, err := os.ReadFile(filepath.Join(directory, "bundle.pem"))
	if err != nil {
		return nil, fmt.Errorf("%w; enrol first", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundle) {
		return nil, fmt.Errorf("%s: no certificate in bundle.pem", directory)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{certificate},
		RootCAs:      roots,
		MinVersion:   tls.VersionTLS12,
		VerifyConnection: func(state tls.ConnectionState) error {
			return checkService(state.PeerCertificates[0], own.Host)
		},
	}, nil
}

// spiffeID is the id on a certificate, which must have exactly one URI among its names.
func spiffeID(certificate *x509.Certificate) (*url.URL, error) {
	if len(certificate.URIs) != 1 || certificate.URIs[0].Scheme != "spiffe" {
		return nil, errors.New("the certificate has no SPIFFE id")
	}
	return certificate.URIs[0], nil
}

// checkService says why a certificate, whose chain and name are right, is not one of a trust domain's services.
func checkService(certificate *x509.Certificate, trustDomain string) error {
	identity, err := spiffeID(certificate)
	if err != nil {
		return err
	}
	if identity.Host != trustDomain || !strings.HasPrefix(identity.Path, "/service/") {
		return fmt.Errorf("the server is %s, which is no service of %s", identity, trustDomain)
	}
	return nil
}
