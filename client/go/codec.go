//go:build grpc133

package deltawire

import (
	"deltawire.dev/go/codec"
	"google.golang.org/grpc"
)

func init() { codecOptions = []grpc.CallOption{grpc.ForceCodec(codec.Codec{})} }
