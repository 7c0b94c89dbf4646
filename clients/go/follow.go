package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	requestv1 "github.com/beamwire/beamwire/gen/go/beamwire/request/v1"
)

const (
	deadline     = 15 * time.Second
	attempts     = 5
	firstPause   = 100 * time.Millisecond
	longestPause = 2 * time.Second
)

// isTerminal says whether a transfer in this state has ended.
func isTerminal(state requestv1.Transfer_State) bool {
	switch state {
	case requestv1.Transfer_STATE_SUCCEEDED, requestv1.Transfer_STATE_CANCELLED,
		requestv1.Transfer_STATE_FAILED, requestv1.Transfer_STATE_EXPIRED:
		return true
	}
	return false
}

// createTransfer creates a transfer. The channel repeats the call while the service is UNAVAILABLE, always with the
// same request id, so that however many arrive, there is one transfer.
func createTransfer(ctx context.Context, client requestv1.RequestServiceClient, wanted *requestv1.Transfer) (*requestv1.Transfer, error) {
	ctx, done := context.WithTimeout(ctx, deadline)
	defer done()
	return client.CreateTransfer(ctx, &requestv1.CreateTransferRequest{Transfer: wanted, RequestId: uuid.NewString()})
}

// cancelTransfer cancels a transfer; one that has ended stays as it is.
func cancelTransfer(ctx context.Context, client requestv1.RequestServiceClient, name string) error {
	ctx, done := context.WithTimeout(ctx, deadline)
	defer done()
	_, err := client.CancelTransfer(ctx, &requestv1.CancelTransferRequest{Name: name, RequestId: uuid.NewString()})
	return err
}

// watch is one transfer on its way to its end.
type watch struct {
	client requestv1.RequestServiceClient
	name   string
	// report is called with the transfer whenever its state has changed.
	report func(*requestv1.Transfer) error
	last   *requestv1.Transfer
}

// toEnd watches the transfer until it has ended, and takes up again a watch that broke.
func (w *watch) toEnd(ctx context.Context) (*requestv1.Transfer, error) {
	for failures := 0; ; {
		before := w.last
		err := w.once(ctx)
		if err == nil {
			return w.last, nil
		}
		if w.last != before {
			failures = 0
		}
		failures++
		if status.Code(err) != codes.Unavailable || failures >= attempts {
			return w.last, err
		}
		if err := pause(ctx, failures); err != nil {
			return w.last, err
		}
	}
}

// once watches until the server ends the watch, which it must not do before the transfer has ended.
func (w *watch) once(ctx context.Context) error {
	ctx, done := context.WithCancel(ctx)
	defer done()
	stream, err := w.client.WatchTransfer(ctx, &requestv1.WatchTransferRequest{Name: w.name, Etag: w.last.GetEtag()})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) && isTerminal(w.last.GetState()) {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the watch of %s ended before the transfer did", w.name)
		}
		if err != nil {
			return err
		}
		if err := w.saw(response.GetTransfer()); err != nil {
			return err
		}
	}
}

func (w *watch) saw(transfer *requestv1.Transfer) error {
	changed := transfer.GetState() != w.last.GetState()
	w.last = transfer
	if !changed {
		return nil
	}
	return w.report(transfer)
}

func pause(ctx context.Context, failures int) error {
	length := min(firstPause<<(failures-1), longestPause)
	select {
	case <-time.After(time.Duration(float64(length) * (0.8 + 0.4*rand.Float64()))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
