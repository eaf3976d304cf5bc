//go:build grpc133

package deltawire

import (
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// codec marshals with google.golang.org/protobuf. grpc-go before 1.34 uses github.com/golang/protobuf as it finds it, and
// version 1.3 of that, which Debian 12 has, fails with a nil dereference on messages that have a oneof.
type codec struct{}

func init() { codecOptions = []grpc.CallOption{grpc.ForceCodec(codec{})} }

func (codec) Name() string { return "proto" }

func (codec) Marshal(value interface{}) ([]byte, error) {
	message, ok := value.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("not a message: %T", value)
	}
	return proto.Marshal(message)
}

func (codec) Unmarshal(data []byte, value interface{}) error {
	message, ok := value.(proto.Message)
	if !ok {
		return fmt.Errorf("not a message: %T", value)
	}
	return proto.Unmarshal(data, message)
}
