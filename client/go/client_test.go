package deltawire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

type streamServer = deltawirev1.ChatCompletion_StreamChatCompletionServer

// gateway is a server whose methods a test gives.
type gateway struct {
	deltawirev1.UnimplementedChatCompletionServer
	deltawirev1.UnimplementedModelRegistryServer
	stream func(*deltawirev1.StreamChatCompletionRequest, streamServer) error
	cancel func(context.Context, *deltawirev1.CancelChatCompletionRequest) error
	get    func(context.Context, *deltawirev1.GetChatCompletionRequest) error
}

func (g *gateway) StreamChatCompletion(request *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
	return g.stream(request, stream)
}

func (g *gateway) CancelChatCompletion(
	ctx context.Context, request *deltawirev1.CancelChatCompletionRequest,
) (*deltawirev1.CancelChatCompletionResponse, error) {
	return &deltawirev1.CancelChatCompletionResponse{}, g.cancel(ctx, request)
}

func (g *gateway) GetChatCompletion(
	ctx context.Context, request *deltawirev1.GetChatCompletionRequest,
) (*deltawirev1.GetChatCompletionResponse, error) {
	return &deltawirev1.GetChatCompletionResponse{CompletionId: request.GetCompletionId()}, g.get(ctx, request)
}

func serve(t *testing.T, g *gateway, options ...grpc.ServerOption) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	deltawirev1.RegisterChatCompletionServer(server, g)
	deltawirev1.RegisterModelRegistryServer(server, g)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func dial(t *testing.T, target string, options ...Option) (*Client, context.Context) {
	t.Helper()
	client, err := Dial(target, options...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(func() { cancel(); client.Close() })
	return client, ctx
}

func started(id string) *deltawirev1.StreamChatCompletionResponse {
	event := &deltawirev1.StreamChatCompletionResponse_Started{Started: &deltawirev1.Started{CompletionId: id}}
	return &deltawirev1.StreamChatCompletionResponse{Event: event}
}

// completed is the last event of a stream with one choice.
func completed(sequence int64, text string, reason deltawirev1.StopReason) *deltawirev1.StreamChatCompletionResponse {
	choice := &deltawirev1.Completed_Choice{Message: &deltawirev1.AssistantMessage{Text: &text}, StopReason: reason}
	end := &deltawirev1.Completed{Choices: []*deltawirev1.Completed_Choice{choice}}
	event := &deltawirev1.StreamChatCompletionResponse_Completed{Completed: end}
	return &deltawirev1.StreamChatCompletionResponse{Sequence: sequence, Event: event}
}

func refuse(ctx context.Context, code codes.Code, reason string) error {
	grpc.SetTrailer(ctx, metadata.Pairs("deltawire-reason", reason))
	return status.Error(code, "refused")
}

func header(ctx context.Context, name string) string {
	given, _ := metadata.FromIncomingContext(ctx)
	return strings.Join(given.Get(name), ",")
}

func TestNoEventAfterClose(t *testing.T) {
	sent := make(chan bool)
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(_ *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			stream.Send(started("cmpl-1"))
			for sequence := int64(1); sequence < 10; sequence++ {
				stream.Send(&deltawirev1.StreamChatCompletionResponse{Sequence: sequence})
			}
			sent <- true
			<-stream.Context().Done()
			return nil
		},
	}))
	for range [20]int{} { // grpc-go chooses at random between the cancel and what it has received.
		stream := client.Stream(ctx, Chat(&deltawirev1.ChatRequest{}))
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		<-sent
		stream.Close()
		if event, err := stream.Recv(); !errors.Is(err, context.Canceled) || *stream.LastSequence() != 0 {
			t.Fatal(event, err)
		}
	}
}

func TestASoftCancelReachesTheGatewayOfTheStream(t *testing.T) {
	ended := make(chan string, 2)
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(_ *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			stream.SendHeader(metadata.Pairs(gatewayHeader, "one"))
			stream.Send(started("cmpl-1"))
			for range [2]int{} { // By its id, and by the stream.
				if got := <-ended; got != "cmpl-1 one" {
					return status.Error(codes.Internal, got)
				}
			}
			return stream.Send(completed(1, "", deltawirev1.StopReason_STOP_REASON_CANCELLED))
		},
		cancel: func(ctx context.Context, request *deltawirev1.CancelChatCompletionRequest) error {
			ended <- header(ctx, routeHeader) + " " + header(ctx, gatewayHeader)
			return nil
		},
	}))
	stream := client.Stream(ctx, Chat(&deltawirev1.ChatRequest{}))
	defer stream.Close()
	if _, err := stream.CancelSoftly(ctx); err == nil {
		t.Error("there is no id before started")
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Cancel(ctx, stream.CompletionID()); err != nil {
		t.Error(err)
	}
	if _, err := stream.CancelSoftly(ctx); err != nil {
		t.Error(err)
	}
	answer, err := stream.Final()
	if err != nil || answer.Completed.GetChoices()[0].GetStopReason() != deltawirev1.StopReason_STOP_REASON_CANCELLED {
		t.Error(answer, err)
	}
}

func TestACompletionIsSearchedOnNewConnections(t *testing.T) {
	var routes, peers []string
	client, ctx := dial(t, serve(t, &gateway{get: func(ctx context.Context, _ *deltawirev1.GetChatCompletionRequest) error {
		caller, _ := peer.FromContext(ctx)
		routes, peers = append(routes, header(ctx, routeHeader)), append(peers, caller.Addr.String())
		switch len(peers) {
		case 1:
			return refuse(ctx, codes.Unavailable, "")
		case 2, 3:
			return refuse(ctx, codes.FailedPrecondition, "WRONG_REPLICA")
		}
		return nil
	}}))
	response, err := client.Get(ctx, "c")
	if err != nil || response.GetCompletionId() != "c" {
		t.Error(response, err)
	}
	if got := strings.Join(routes, " "); got != "c c c#1 c#2" {
		t.Error(got)
	}
	if peers[0] != peers[1] || peers[1] == peers[2] || peers[2] == peers[3] {
		t.Error(peers)
	}
}

func TestASearchEndsWithTheDeadline(t *testing.T) {
	client, ctx := dial(t, serve(t, &gateway{get: func(ctx context.Context, _ *deltawirev1.GetChatCompletionRequest) error {
		return refuse(ctx, codes.FailedPrecondition, "WRONG_REPLICA")
	}}))
	ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := client.Get(ctx, "c"); !errors.Is(err, context.DeadlineExceeded) || status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
}

func TestAStreamFromTheMiddleHasTheMessagesOfCompleted(t *testing.T) {
	end := completed(2, "all of it", deltawirev1.StopReason_STOP_REASON_END_OF_TURN)
	events := []*deltawirev1.StreamChatCompletionResponse{end}
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(_ *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			for _, event := range events {
				stream.Send(event)
			}
			return nil
		},
	}))
	last := int64(1)
	answer, err := client.Stream(ctx, Resume("c", &last)).Final()
	if err != nil || answer.Text() != "all of it" {
		t.Error(answer, err)
	}
	events, last = nil, 2
	if answer, err = client.Stream(ctx, Resume("c", &last)).Final(); err != nil || answer.Text() != "" {
		t.Error(answer, err)
	}
}

func TestAResumedStreamSkipsWhatItHas(t *testing.T) {
	var resumed []int64
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(request *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			stream.Send(started("c"))
			if request.GetChat() != nil {
				return status.Error(codes.Internal, "a proxy cut it off")
			}
			resumed = append(resumed, request.GetResume().GetLastSequence())
			return stream.Send(completed(1, "", deltawirev1.StopReason_STOP_REASON_END_OF_TURN))
		},
	}))
	request := Chat(&deltawirev1.ChatRequest{})
	request.Options = &deltawirev1.StreamOptions{Retention: durationpb.New(time.Minute)}
	stream := client.Stream(ctx, request)
	if answer, err := stream.Final(); err != nil || answer.Completed == nil || len(resumed) != 1 || resumed[0] != 0 {
		t.Error(answer, err, resumed)
	}
	if !strings.HasPrefix(stream.resumption.completionID, "own-") || request.GetChat().GetCompletionId() != "" {
		t.Error("the id is not of the client's making, or in the caller's request")
	}
}

func TestTheGatewayCanForbidARetry(t *testing.T) {
	calls := 0
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(_ *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			calls++
			stream.SetTrailer(metadata.Pairs("grpc-retry-pushback-ms", "-1"))
			return status.Error(codes.Unavailable, "not again")
		},
	}))
	if _, err := client.Stream(ctx, Chat(&deltawirev1.ChatRequest{})).Final(); status.Code(err) != codes.Unavailable || calls != 1 {
		t.Error(err, calls)
	}
}

func TestCallsAreNotExecutableWithoutCompleted(t *testing.T) {
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(_ *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			stream.Send(started("c"))
			finished := &deltawirev1.ChoiceFinished{ToolCallsExecutable: true}
			event := &deltawirev1.StreamChatCompletionResponse_ChoiceFinished{ChoiceFinished: finished}
			return stream.Send(&deltawirev1.StreamChatCompletionResponse{Sequence: 1, ChoiceIndex: new(int32), Event: event})
		},
	}))
	_, err := client.Stream(ctx, Chat(&deltawirev1.ChatRequest{})).Final()
	var failure *Error
	if !errors.As(err, &failure) || !failure.Interrupted || failure.Answer.Choice().GetToolCallsExecutable() {
		t.Error(err)
	}
}

func TestClosingTheClientEndsItsCalls(t *testing.T) {
	client, ctx := dial(t, serve(t, &gateway{
		stream: func(_ *deltawirev1.StreamChatCompletionRequest, stream streamServer) error {
			stream.Send(started("c"))
			<-stream.Context().Done()
			return nil
		},
	}))
	stream, watch := client.Stream(ctx, Chat(&deltawirev1.ChatRequest{})), client.WatchModels(ctx, "", nil)
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	client.Close()
	var failure *Error
	if _, err := stream.Recv(); !errors.As(err, &failure) || failure.Code != codes.Canceled || failure.Interrupted {
		t.Error(err)
	}
	if _, err := watch.Recv(); !errors.Is(err, context.Canceled) || ctx.Err() != nil {
		t.Error(err)
	}
	if _, err := client.Get(ctx, "c"); !errors.Is(err, context.Canceled) || ctx.Err() != nil {
		t.Error(err)
	}
}

func TestAKeyIsNotSentInPlaintextToOtherMachines(t *testing.T) {
	if _, err := Dial("gateway.example:50051", WithKey("secret")); err == nil || !strings.Contains(err.Error(), "WithTLS") {
		t.Error(err)
	}
	client, err := Dial("gateway.example:50051", WithKey("secret"), WithPlaintextKey())
	if err != nil {
		t.Fatal(err)
	}
	client.Close()
}

func TestTLS(t *testing.T) {
	certified := httptest.NewTLSServer(nil) // For its certificate.
	defer certified.Close()
	var got string
	target := serve(t, &gateway{get: func(ctx context.Context, _ *deltawirev1.GetChatCompletionRequest) error {
		got = header(ctx, "authorization")
		return nil
	}}, grpc.Creds(credentials.NewServerTLSFromCert(&certified.TLS.Certificates[0])))
	roots := x509.NewCertPool()
	roots.AddCert(certified.Certificate())
	client, ctx := dial(t, target, WithKey("secret"), WithTLS(&tls.Config{RootCAs: roots}))
	if _, err := client.Get(ctx, "c"); err != nil || got != "Bearer secret" {
		t.Error(got, err)
	}
	stranger, ctx := dial(t, target, WithKey("secret"), WithTLS(&tls.Config{}))
	if _, err := stranger.Get(ctx, "c"); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
}

func TestToolsAreReadInBothForms(t *testing.T) {
	const given = `[
		{"name": "one", "inputSchema": "{\"type\": \"object\"}", "strict": true},
		{"type": "function", "function": {"name": "two", "description": "d", "parameters": {"b": 1,  "a": 2.0}}}
	]`
	tools, err := ParseTools([]byte(given))
	if err != nil {
		t.Fatal(err)
	}
	if len(tools) != 2 || tools[0].GetInputSchema() != `{"type": "object"}` || !tools[0].GetStrict() {
		t.Error(tools)
	}
	if tools[1].GetName() != "two" || tools[1].GetInputSchema() != `{"b": 1,  "a": 2.0}` || tools[1].Strict != nil {
		t.Error(tools)
	}
	for _, wrong := range []string{`{}`, `{"type": "web_search"}`, `{"name": "x", "inputschema": {}}`, `nothing`} {
		if _, err := ParseTools([]byte(wrong)); err == nil {
			t.Error(wrong)
		}
	}
}
