// Package codec marshals messages for grpc-go before 1.34, which uses github.com/golang/protobuf as it finds it. Version 1.3 of
// that, which Debian 12 has, fails with a nil dereference on messages that have a oneof. Newer versions of grpc-go need no codec.
package codec

import (
	"fmt"

	"google.golang.org/protobuf/proto"
)

// Codec marshals with google.golang.org/protobuf: a client dials with
// grpc.WithDefaultCallOptions(grpc.ForceCodec(codec.Codec{})).
type Codec struct{}

// Name is that of gRPC's own codec, which it stands in for.
func (Codec) Name() string { return "proto" }

// Marshal encodes a message.
func (Codec) Marshal(value interface{}) ([]byte, error) {
	message, ok := value.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("not a message: %T", value)
	}
	return proto.Marshal(message)
}

// Unmarshal decodes a message.
func (Codec) Unmarshal(data []byte, value interface{}) error {
	message, ok := value.(proto.Message)
	if !ok {
		return fmt.Errorf("not a message: %T", value)
	}
	return proto.Unmarshal(data, message)
}
