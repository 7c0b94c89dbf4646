// Creates a Beamwire transfer and watches it to its end.
module github.com/beamwire/beamwire/clients/go

go 1.26.0

require (
	github.com/beamwire/beamwire/gen/go v0.0.0
	github.com/google/uuid v1.6.0
	google.golang.org/genproto/googleapis/rpc v0.0.0-20261019180522-ce908d29299b
	google.golang.org/grpc v1.85.0
	google.golang.org/protobuf v1.36.12
)

require (
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/sys v0.48.0 // indirect
	golang.org/x/text v0.42.0 // indirect
	google.golang.org/genproto/googleapis/api v0.0.0-20261019180522-ce908d29299b // indirect
)

replace github.com/beamwire/beamwire/gen/go => ../../gen/go
