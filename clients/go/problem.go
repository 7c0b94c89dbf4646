package main

import (
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
)

// problem is an error of the service in words: the reason that the contract names, and the fields at fault.
type problem struct {
	Reason  string            `json:"reason"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

// problemOf is what a failed call, or the error in a resource, says. Without an answer of the service the reason is
// gRPC's own code.
func problemOf(failure *status.Status) problem {
	found := problem{Reason: code.Code(failure.Code()).String(), Message: failure.Message()}
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			found.Reason = detail.GetReason()
		case *errdetails.BadRequest:
			found.Fields = map[string]string{}
			for _, violation := range detail.GetFieldViolations() {
				found.Fields[violation.GetField()] = violation.GetDescription()
			}
		}
	}
	return found
}
