module deltawire.dev/polyglot/chat

go 1.19

// The versions are those of the Debian packages, whose sources the test puts into vendor/.
require (
	deltawire.dev/go v0.0.0
	github.com/golang/protobuf v1.3.5
	golang.org/x/net v0.7.0
	golang.org/x/sys v0.3.0
	golang.org/x/text v0.7.0
	google.golang.org/genproto v0.0.0
	google.golang.org/grpc v1.33.3
	google.golang.org/protobuf v1.28.1
)

replace deltawire.dev/go => ./stubs
