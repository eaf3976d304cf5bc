// Package deltawire is a client of the deltawire gateway: chat completions as streams of typed events, which are retried and
// resumed after lost connections, and watches of models.
package deltawire

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"math"
	mathrand "math/rand"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

const (
	requestIDHeader = "x-request-id"
	// By these a proxy finds the gateway that has a completion, as the shipped Envoy does. Calls with the same route go to
	// the same gateway; the other one comes from the proxy, names the gateway, and is sent back.
	routeHeader   = "x-deltawire-route"
	gatewayHeader = "x-deltawire-gateway"

	// Attempts of a call that has received nothing.
	maxAttempts = 4
	// New connections to find the process that has a completion: behind a balancer each may reach another one.
	maxConnections = 8
	// Completions of which a client remembers the gateway: those that a busy program may still look up or end.
	maxGateways = 10000
	// The first pause between two calls, and the longest, if the gateway does not ask for a longer one.
	minPause, maxPause = 200 * time.Millisecond, 2 * time.Second
	// An answer with log-probabilities exceeds gRPC's default of 4 MiB.
	maxReceiveBytes = 64 << 20
)

// codecOptions is empty but for old versions of grpc-go; see codec.go.
var codecOptions []grpc.CallOption

// Client makes calls to a gateway. It may be used by any number of goroutines.
type Client struct {
	conn     *grpc.ClientConn
	dial     func() (*grpc.ClientConn, error)
	gateways gateways
	mutex    sync.Mutex
	// The connections that streams and searches have for themselves.
	others map[*grpc.ClientConn]bool
}

// Option changes how a client connects.
type Option func(*settings)

type settings struct {
	key       bearer
	tls       *tls.Config
	plaintext bool
	options   []grpc.DialOption
}

// WithKey sends the caller's access key with each call. It is refused over plaintext to other machines.
func WithKey(key string) Option { return func(s *settings) { s.key.key = key } }

// WithPlaintextKey lets the key be sent over plaintext to other machines, for example to a sidecar.
func WithPlaintextKey() Option { return func(s *settings) { s.plaintext = true } }

// WithTLS connects with TLS; &tls.Config{} trusts the system's root certificates.
func WithTLS(config *tls.Config) Option { return func(s *settings) { s.tls = config } }

// WithDialOptions adds options of gRPC, which override the client's own.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) { s.options = append(s.options, options...) }
}

// Dial makes a client for the gateway at a target such as "127.0.0.1:50051". It does not wait for the connection.
func Dial(target string, options ...Option) (*Client, error) {
	var set settings
	for _, option := range options {
		option(&set)
	}
	// Found soon after it is back; gRPC would let two minutes pass.
	reconnect := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 10 * time.Second}
	dialOptions := []grpc.DialOption{
		grpc.WithDefaultCallOptions(append(codecOptions, grpc.MaxCallRecvMsgSize(maxReceiveBytes))...),
		// A stream can be silent for minutes while a long prompt is read; pings detect that the peer has disconnected.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 20 * time.Second}),
		grpc.WithUserAgent("deltawire-go"),
	}
	if set.tls != nil {
		dialOptions = append(dialOptions, grpc.WithTransportCredentials(credentials.NewTLS(set.tls)))
	} else {
		dialOptions = append(dialOptions, grpc.WithInsecure())
	}
	if set.key.key != "" {
		set.key.secure = !set.plaintext && !isLocal(target)
		dialOptions = append(dialOptions, grpc.WithPerRPCCredentials(set.key))
	}
	dialOptions = append(dialOptions, set.options...)
	dial := func() (*grpc.ClientConn, error) { return grpc.Dial(target, dialOptions...) }
	conn, err := dial()
	// By its text, because grpc-go does not export this error, and options may bring credentials of their own.
	if err != nil && strings.Contains(err.Error(), "transport level security") {
		err = fmt.Errorf("a key is not sent over plaintext to another machine: use WithTLS, or WithPlaintextKey: %w", err)
	}
	return &Client{conn: conn, dial: dial, others: map[*grpc.ClientConn]bool{}}, err
}

// Close closes the connections. Calls that are active fail as canceled.
func (c *Client) Close() error {
	err := c.conn.Close()
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for conn := range c.others {
		conn.Close()
	}
	return err
}

// another makes a connection for one call. It must be dropped.
func (c *Client) another() (*grpc.ClientConn, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.others[conn] = true
	if isClosed(c.conn) {
		conn.Close()
	}
	return conn, nil
}

// drop closes such a connection.
func (c *Client) drop(conn *grpc.ClientConn) {
	c.mutex.Lock()
	delete(c.others, conn)
	c.mutex.Unlock()
	conn.Close()
}

// Conn is the connection, with the caller's key, for calls with the generated stubs. Those are not retried.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Cancel ends a completion softly: its stream ends normally, with the text so far and the usage. The response has the state
// before the cancel. It tries up to eight new connections to find the gateway process that has the completion.
func (c *Client) Cancel(ctx context.Context, completionID string) (*deltawirev1.CancelChatCompletionResponse, error) {
	return c.cancel(ctx, c.conn, completionID)
}

func (c *Client) cancel(
	ctx context.Context, conn *grpc.ClientConn, completionID string,
) (response *deltawirev1.CancelChatCompletionResponse, err error) {
	request := &deltawirev1.CancelChatCompletionRequest{CompletionId: completionID}
	err = c.find(ctx, conn, completionID, func(ctx context.Context, stub stub, options ...grpc.CallOption) error {
		response, err = stub.CancelChatCompletion(ctx, request, options...)
		return err
	})
	return response, err
}

// Get returns the state of a completion, its usage, and its result if that is retained. It searches like Cancel.
func (c *Client) Get(
	ctx context.Context, completionID string,
) (response *deltawirev1.GetChatCompletionResponse, err error) {
	request := &deltawirev1.GetChatCompletionRequest{CompletionId: completionID}
	err = c.find(ctx, c.conn, completionID, func(ctx context.Context, stub stub, options ...grpc.CallOption) error {
		response, err = stub.GetChatCompletion(ctx, request, options...)
		return err
	})
	return response, err
}

type stub = deltawirev1.ChatCompletionClient

type unary func(context.Context, stub, ...grpc.CallOption) error

// find makes a call about a completion, with retries, and on new connections until one reaches the process that has it.
func (c *Client) find(ctx context.Context, conn *grpc.ClientConn, completionID string, call unary) error {
	ctx, requestID := withRequestID(ctx)
	pauses := pauses{max: maxPause}
	for attempt, moved := 1, 0; ; {
		var header, trailer metadata.MD
		about := withRoute(ctx, completionID, c.gateways.of(completionID), moved)
		err := call(about, deltawirev1.NewChatCompletionClient(conn), grpc.Header(&header), grpc.Trailer(&trailer))
		if moved > 0 {
			c.drop(conn)
		}
		if err == nil {
			c.gateways.found(completionID, first(header, gatewayHeader))
			return nil
		}
		if ctx.Err() != nil {
			return endOf(ctx, nil, requestID)
		}
		failure := errorOf(err, header, trailer, requestID)
		switch {
		case failure.Reason == "WRONG_REPLICA" && moved < maxConnections:
			moved++
		case failure.passes() && attempt < maxAttempts && !isClosed(c.conn):
			attempt++
		default:
			return failure
		}
		if !wait(ctx, pauses.next(failure)) {
			return endOf(ctx, failure, requestID)
		}
		if moved > 0 {
			if conn, err = c.another(); err != nil {
				return err
			}
		}
	}
}

// withRequestID sends an id by which a call without a response is found in the gateway's log.
func withRequestID(ctx context.Context) (context.Context, string) {
	given, _ := metadata.FromOutgoingContext(ctx)
	if id := first(given, requestIDHeader); id != "" {
		return ctx, id
	}
	id := randomID()
	return metadata.AppendToOutgoingContext(ctx, requestIDHeader, id), id
}

// withRoute lets a proxy send a call to the gateway that has the completion; after some that did not have it, to another
// one. The caller's own headers have precedence.
func withRoute(ctx context.Context, completionID, gateway string, moved int) context.Context {
	route := completionID
	if moved > 0 {
		route, gateway = completionID+"#"+strconv.Itoa(moved), ""
	}
	if strings.IndexFunc(route, func(r rune) bool { return r < '!' || r > '~' }) >= 0 {
		route = "" // It does not fit into a header, and the gateway refuses it.
	}
	given, _ := metadata.FromOutgoingContext(ctx)
	for name, value := range map[string]string{routeHeader: route, gatewayHeader: gateway} {
		if value != "" && len(given.Get(name)) == 0 {
			ctx = metadata.AppendToOutgoingContext(ctx, name, value)
		}
	}
	return ctx
}

// gateways remember which gateway has a completion, as far as a proxy has named it in the headers of a call. A proxy names it
// only to calls that have not.
type gateways struct {
	mutex sync.Mutex
	names map[string]string
	ids   []string // In the order of their arrival.
}

func (g *gateways) found(completionID, gateway string) {
	if completionID == "" || gateway == "" {
		return
	}
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if g.names == nil {
		g.names = map[string]string{}
	}
	if g.names[completionID] == "" {
		if g.ids = append(g.ids, completionID); len(g.ids) > maxGateways {
			delete(g.names, g.ids[0])
			g.ids = g.ids[1:]
		}
	}
	g.names[completionID] = gateway
}

func (g *gateways) of(completionID string) string {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	return g.names[completionID]
}

// pauses are those between the calls of one completion or watch: each longer than the one before it, and random, so that
// clients that were disconnected together do not come back together.
type pauses struct {
	count int
	max   time.Duration
}

// next is the next pause; longer if the gateway asks for it.
func (p *pauses) next(failure *Error) time.Duration {
	longest := math.Min(float64(p.max), float64(minPause)*math.Pow(2, float64(p.count)))
	p.count++
	return time.Duration(math.Max(longest*(1+mathrand.Float64())/2, float64(failure.delay())))
}

// wait lets time pass; false if the context ended meanwhile.
func wait(ctx context.Context, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// bearer is an access key.
type bearer struct {
	key    string
	secure bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.key}, nil
}

func (b bearer) RequireTransportSecurity() bool { return b.secure }

func isLocal(target string) bool {
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = target
	}
	return strings.HasPrefix(target, "unix:") || host == "localhost" || net.ParseIP(host).IsLoopback()
}

func randomID() string {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		panic(err)
	}
	return hex.EncodeToString(id[:])
}
