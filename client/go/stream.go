package deltawire

import (
	"context"
	"errors"
	"io"
	"sync"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// Stream is an answer that is being generated. One goroutine may receive from it; CancelSoftly may be called by any.
type Stream struct {
	client     *Client
	ctx        context.Context
	cancel     context.CancelFunc
	call       deltawirev1.ChatCompletion_StreamChatCompletionClient
	resumption *resumption
	folded     *accumulator
	// The gateway that the headers of the current call name, until it is remembered.
	gateway   string
	requestID string
	// Whether the current call, and whether any, has received something.
	hasReceived, everReceived bool
	err                       error

	mutex        sync.Mutex // for what follows
	conn         *grpc.ClientConn
	completionID string
}

// Stream asks for a chat completion, or resumes one. Canceling the context, or its deadline, ends the call on both sides.
// Metadata of the context (metadata.AppendToOutgoingContext) is sent too. The call is made when it is first received from.
//
// A call that fails as UNAVAILABLE, or as RESOURCE_EXHAUSTED with RetryInfo, before anything was received is repeated, at
// most four times in all. A stream with retention is resumed after a lost connection: every event is received once.
func (c *Client) Stream(ctx context.Context, request *deltawirev1.StreamChatCompletionRequest) *Stream {
	ctx, cancel := context.WithCancel(ctx)
	ctx, requestID := withRequestID(ctx)
	resumption := newResumption(request)
	return &Stream{
		client: c, ctx: ctx, cancel: cancel, resumption: resumption, folded: newAccumulator(resumption.last),
		conn: c.conn, requestID: requestID, completionID: resumption.completionID,
	}
}

// Recv returns the next event; skip those without an event, which are of later versions. At the end of the answer it
// returns io.EOF, and otherwise an *Error.
func (s *Stream) Recv() (*deltawirev1.StreamChatCompletionResponse, error) {
	for s.err == nil {
		event, err := s.receive()
		if err != nil {
			s.ended(err)
			continue
		}
		if s.resumption.calls > 1 && event.GetSequence() < s.folded.next {
			continue // It was replayed.
		}
		if broken := s.folded.receive(event); broken != nil {
			s.fail(broken)
			break
		}
		s.resumption.received(event.GetSequence())
		if started := event.GetStarted(); started != nil {
			s.mutex.Lock()
			s.completionID = started.GetCompletionId()
			s.mutex.Unlock()
		}
		if s.completionID != "" && s.gateway != "" {
			s.client.gateways.found(s.completionID, s.gateway)
			s.gateway = ""
		}
		return event, nil
	}
	return nil, s.err
}

// Final reads to the end and returns the whole answer.
func (s *Stream) Final() (*Answer, error) {
	for {
		if _, err := s.Recv(); err == io.EOF {
			return s.folded.result(), nil
		} else if err != nil {
			return nil, err
		}
	}
}

// Close ends the call. With retention the gateway continues to generate until the stream is resumed or its retention has
// passed; CancelSoftly ends that.
func (s *Stream) Close() { s.release() }

// CancelSoftly ends generation. Receiving then goes on to the normal end: the text so far, STOP_REASON_CANCELLED and the
// usage. It needs the completion's id: one of the caller's, or that of started.
func (s *Stream) CancelSoftly(ctx context.Context) (*deltawirev1.CancelChatCompletionResponse, error) {
	s.mutex.Lock()
	conn, completionID := s.conn, s.completionID
	s.mutex.Unlock()
	if completionID == "" {
		return nil, errors.New("deltawire: the completion's id is not known before started: send a completion_id")
	}
	response, err := s.client.cancel(ctx, conn, completionID)
	if err != nil && conn != s.client.conn && isClosed(conn) {
		// The stream has ended meanwhile and closed the connection that it had for itself.
		return s.client.Cancel(ctx, completionID)
	}
	return response, err
}

// CompletionID is the completion's id; empty before started, unless the request has one.
func (s *Stream) CompletionID() string { return s.completionID }

// LastSequence is the sequence of the last event that was received, to resume after it; nil if there was none.
func (s *Stream) LastSequence() *int64 { return s.resumption.last }

// RequestID is the call's id in the gateway's log.
func (s *Stream) RequestID() string { return s.requestID }

// receive returns the next event of the call, and begins one if there is none.
func (s *Stream) receive() (*deltawirev1.StreamChatCompletionResponse, error) {
	if s.call == nil {
		request := s.resumption.begin()
		gateway := s.client.gateways.of(s.completionID)
		if request.GetChat() != nil {
			s.folded = newAccumulator(nil) // Only heartbeats can have come before.
			gateway = ""                   // That of an earlier completion with this id may be about to shut down.
		}
		moved := 0
		if s.resumption.moves {
			moved = s.resumption.moved
		}
		ctx := withRoute(s.ctx, s.completionID, gateway, moved)
		s.hasReceived = false
		call, err := deltawirev1.NewChatCompletionClient(s.conn).StreamChatCompletion(ctx, request)
		if err != nil {
			return nil, err
		}
		s.call = call
	}
	event, err := s.call.Recv()
	for err == nil && s.ctx.Err() == context.Canceled {
		event, err = s.call.Recv() // grpc-go may still return what it had received before the cancel.
	}
	if err == nil && !s.hasReceived {
		s.hasReceived, s.everReceived = true, true
		header, _ := s.call.Header()
		s.gateway, s.requestID = first(header, gatewayHeader), firstOf(first(header, requestIDHeader), s.requestID)
	}
	return event, err
}

// ended takes the end of a call: it decides the outcome of the stream, or waits until it is time for the next call.
func (s *Stream) ended(err error) {
	failure := failureOf(s.call, err, s.requestID)
	s.call = nil
	completed := s.folded.answer.Completed
	if completed != nil && completed.GetError() == nil || completed == nil && failure == nil && s.folded.isOnlyTheEnd() {
		s.err = io.EOF // It is whole, whatever happened to the status.
		s.release()
		return
	}
	if completed != nil {
		s.fail(failure.withFault(completed.GetError()))
		return
	}
	if s.ctx.Err() != nil {
		s.fail(endOf(s.ctx, nil, s.requestID))
		return
	}
	begun, closed := s.folded.hasBegun(), isClosed(s.client.conn)
	pause, again := s.resumption.next(failure, !s.everReceived, begun)
	if !again || closed {
		if failure == nil {
			// A status of OK without an answer is a failure.
			failure = &Error{Code: codes.Unknown, Message: "the stream ended without its last event", Interrupted: true}
		}
		failure.Interrupted = failure.Interrupted || begun && !closed && failure.Code != codes.DeadlineExceeded
		s.fail(failure)
	} else if !wait(s.ctx, pause) {
		s.fail(endOf(s.ctx, failure, s.requestID))
	} else if s.resumption.moves {
		if conn, err := s.client.another(); err == nil {
			s.leave(conn)
		}
	}
}

// fail ends the stream with a failure.
func (s *Stream) fail(failure *Error) {
	failure.RequestID = firstOf(failure.RequestID, s.requestID)
	if s.folded.hasBegun() {
		failure.Answer = s.folded.result()
	}
	s.err = failure
	s.release()
}

// release ends the call and closes the connection that the stream has for itself.
func (s *Stream) release() {
	s.cancel()
	s.leave(s.client.conn)
}

// leave closes the connection that this stream has for itself, if it has one, and goes to another one.
func (s *Stream) leave(conn *grpc.ClientConn) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.conn != s.client.conn {
		s.client.drop(s.conn)
	}
	s.conn = conn
}

func isClosed(conn *grpc.ClientConn) bool { return conn.GetState() == connectivity.Shutdown }
