// Sends to a cache and receives from it through mangos, the scalability protocols in Go.
module github.com/beamwire/beamwire/tests/interop

go 1.26.0

require (
	github.com/beamwire/beamwire/gen/go v0.0.0
	go.nanomsg.org/mangos/v3 v3.4.2
	google.golang.org/protobuf v1.36.12
)

replace github.com/beamwire/beamwire/gen/go => ../../gen/go
