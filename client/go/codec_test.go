//go:build grpc133

package deltawire

import (
	"deltawire.dev/go/codec"
	"google.golang.org/grpc/encoding"
)

// For the tests' server.
func init() { encoding.RegisterCodec(codec.Codec{}) }
