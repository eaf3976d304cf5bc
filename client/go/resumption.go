package deltawire

import (
	"time"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// For how long a stream that the caller resumes goes on without a new event.
const resumeFor = 60 * time.Second

// resumption decides whether there is another call after one has ended without the stream's last event, and what it asks.
//
// A call that starts a completion and has received nothing is repeated for a passing failure, at most maxAttempts times in
// all. What is asked with retention goes on in other cases too, after a pause, until it has brought nothing new for as long:
//
//	how the call ended               after                        next
//	connection lost, or the gateway  any call                     resume after the last event
//	cut this call only
//	refused for now                  a resuming call              resume after the last event
//	another process has it           a resuming call              resume on a new connection, at most maxConnections
//	                                                              times since the last event
//	no such completion               a resuming call, not begun   start again, at most maxAttempts times in all
//	                                 a resuming call, begun       as if another process has it: an id of a caller does
//	                                                              not say which process that is
//	the completion exists already    a starting call, if the id   resume: it is our own, whose beginning was lost
//	                                 is ours
//	anything else                    any call                     give up: a retry would fail again
type resumption struct {
	request      *deltawirev1.StreamChatCompletionRequest
	completionID string
	// The last event that was read; nil if none was.
	last *int64
	// Zero if the stream does not go on.
	retention time.Duration
	// Whether the id was generated here.
	madeID   bool
	resuming bool
	starts   int
	calls    int
	// How many new connections were needed since the last event; the next call needs one if moves.
	moved  int
	moves  bool
	since  time.Time
	pauses pauses
}

func newResumption(given *deltawirev1.StreamChatCompletionRequest) *resumption {
	request := proto.Clone(given).(*deltawirev1.StreamChatCompletionRequest)
	r := &resumption{request: request, since: time.Now(), pauses: pauses{max: maxPause}}
	if point := request.GetResume(); point != nil {
		r.resuming, r.retention, r.completionID, r.last = true, resumeFor, point.GetCompletionId(), point.LastSequence
		return r
	}
	if retention := request.GetOptions().GetRetention(); retention != nil {
		r.retention = retention.AsDuration()
	}
	if chat := request.GetChat(); r.retention > 0 && chat != nil && chat.CompletionId == "" {
		// So that it can be resumed before its first event.
		chat.CompletionId, r.madeID = "own-"+randomID(), true
	}
	r.completionID = request.GetChat().GetCompletionId()
	return r
}

// begin returns the next call's request. One that starts the stream anew counts its events from 0 again.
func (r *resumption) begin() *deltawirev1.StreamChatCompletionRequest {
	r.calls++
	if r.resuming {
		point := &deltawirev1.ResumePoint{CompletionId: r.completionID, LastSequence: r.last}
		return &deltawirev1.StreamChatCompletionRequest{Start: &deltawirev1.StreamChatCompletionRequest_Resume{Resume: point}}
	}
	r.starts++
	r.last = nil
	return r.request
}

// received takes note of an event that had not come before.
func (r *resumption) received(sequence int64) {
	r.last, r.since, r.moved = &sequence, time.Now(), 0
	r.pauses.count = 0
}

// next decides after the end of a call; a nil failure is a status of OK. untouched says that no call has received anything.
// It returns how long to wait before the next call, and whether there is one.
func (r *resumption) next(failure *Error, untouched, begun bool) (time.Duration, bool) {
	r.moves = false
	if untouched && !r.resuming && r.starts < maxAttempts && failure != nil && failure.passes() {
		return r.pauses.next(failure), true
	}
	if r.retention == 0 || !r.goesOn(failure, begun) {
		return 0, false
	}
	pause := r.pauses.next(failure)
	return pause, time.Since(r.since)+pause <= r.retention
}

func (r *resumption) goesOn(failure *Error, begun bool) bool {
	reason := "DRAINING" // The end of a call that says nothing is a lost connection.
	if failure != nil {
		reason = failure.Reason
	}
	switch reason {
	case "DRAINING", "SLOW_CALLER":
		r.resuming = true
		return true
	case "TOO_MANY_STREAMS", "CALLER_LIMIT_EXCEEDED", "STORE_UNAVAILABLE":
		return r.resuming
	case "WRONG_REPLICA":
		return r.goesElsewhere()
	case "COMPLETION_NOT_FOUND":
		if begun {
			return r.goesElsewhere()
		}
		again := r.resuming && 0 < r.starts && r.starts < maxAttempts
		r.resuming = r.resuming && !again
		return again
	case "COMPLETION_ALREADY_EXISTS":
		ours := !r.resuming && (r.madeID || r.starts > 1)
		r.resuming = r.resuming || ours
		return ours
	}
	if _, known := deltawirev1.ErrorReason_value[reasonPrefix+reason]; known {
		return false
	}
	// Without a known reason the status is that of a proxy or of the connection. RESOURCE_EXHAUSTED is a message above the
	// size limit, which would be as large again.
	switch failure.Code {
	case codes.Unavailable, codes.Internal, codes.Unknown, codes.Canceled, codes.DeadlineExceeded:
		r.resuming = true
		return true
	}
	return false
}

func (r *resumption) goesElsewhere() bool {
	r.moved++
	r.moves = r.resuming && r.moved <= maxConnections
	return r.moves
}
