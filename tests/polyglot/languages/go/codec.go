package main

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"
)

// codec marshals with google.golang.org/protobuf. Debian's grpc-go 1.33 uses github.com/golang/protobuf 1.3, which fails
// with a nil dereference on messages that have a oneof. Current versions of grpc-go need no codec.
type codec struct{}

func init() { encoding.RegisterCodec(codec{}) }

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
