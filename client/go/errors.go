package deltawire

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Violation is a field of the request that breaks a rule.
type Violation struct {
	// Field is its path, such as "chat.messages".
	Field string
	// Description says what is wrong with it, for people.
	Description string
}

// Error is a failed call. Branch on Code, Reason and Interrupted, never on Message.
//
// errors.Is reports whether it is context.Canceled or context.DeadlineExceeded by its code, and status.Code returns the
// code.
type Error struct {
	// Code is the gRPC status code. If a proxy has replaced the status of a stream, it is that of Completed.error.
	Code codes.Code
	// Reason is the gateway's reason, such as "MODEL_NOT_FOUND"; empty if the failure is not the gateway's.
	Reason string
	// Message describes the failure, for people.
	Message string
	// Metadata has the entries of ErrorInfo, which error_reason.proto lists.
	Metadata map[string]string
	// Violations are the fields that the gateway refused.
	Violations []Violation
	// RetryDelay is the delay of RetryInfo; nil without one.
	RetryDelay *time.Duration
	// RequestID is the call's id in the gateway's log.
	RequestID string
	// Interrupted reports whether a stream ended after its beginning and without its last event, other than by the
	// caller's own cancel or deadline: what else there was is unknown.
	Interrupted bool
	// Answer is what a stream had received; nil before its beginning.
	Answer *Answer

	// pushback is gRPC's own form of the delay, which proxies keep when they drop the details; nil without one. A negative
	// one forbids a retry.
	pushback *time.Duration
}

func (e *Error) Error() string {
	text := "deltawire: "
	if e.Interrupted {
		text += "the stream broke off: "
	}
	text += e.Code.String()
	if e.Reason != "" {
		text += " (" + e.Reason + ")"
	}
	return text + ": " + e.Message
}

// Is makes errors.Is work with the errors of package context.
func (e *Error) Is(target error) bool {
	return target == context.Canceled && e.Code == codes.Canceled ||
		target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded
}

// GRPCStatus makes status.Code and status.FromError work, without the details.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// errorOf reads everything that a failed call says. The request id is the one that was sent.
func errorOf(err error, header, trailer metadata.MD, requestID string) *Error {
	given := status.Convert(err)
	failure := &Error{
		Code:      given.Code(),
		Message:   given.Message(),
		Reason:    first(trailer, "deltawire-reason"),
		RequestID: firstOf(first(header, requestIDHeader), first(trailer, requestIDHeader), requestID),
	}
	if milliseconds, err := strconv.ParseInt(first(trailer, "grpc-retry-pushback-ms"), 10, 32); err == nil {
		pushback := time.Duration(milliseconds) * time.Millisecond
		failure.pushback = &pushback
	}
	for _, detail := range given.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == "deltawire.dev" {
				failure.Reason, failure.Metadata = detail.GetReason(), detail.GetMetadata()
				failure.RequestID = firstOf(detail.GetMetadata()["request_id"], failure.RequestID)
			}
		case *errdetails.RetryInfo:
			if given := detail.GetRetryDelay(); given != nil {
				delay := time.Duration(given.GetSeconds())*time.Second + time.Duration(given.GetNanos())
				failure.RetryDelay = &delay
			}
		case *errdetails.BadRequest:
			for _, each := range detail.GetFieldViolations() {
				failure.Violations = append(failure.Violations, Violation{each.GetField(), each.GetDescription()})
			}
		}
	}
	return failure
}

// failureOf is how a call with a stream of messages failed; nil if its status was OK. The call is nil if it did not begin.
func failureOf(call grpc.ClientStream, err error, requestID string) *Error {
	if err == io.EOF {
		return nil
	}
	if call == nil {
		return errorOf(err, nil, nil, requestID)
	}
	header, _ := call.Header()
	return errorOf(err, header, call.Trailer(), requestID)
}

// withFault takes the fault in Completed, unless the status has the reason itself. A proxy may have made that OK.
func (e *Error) withFault(fault *deltawirev1.Completed_Error) *Error {
	if e == nil {
		e = &Error{}
	}
	if e.Reason == "" {
		e.Code, e.Message = codes.Code(fault.GetCode()), fault.GetMessage()
		e.Reason = strings.TrimPrefix(fault.GetReason().String(), reasonPrefix)
	}
	return e
}

// passes reports whether a call that has received nothing may be made again. Canceled, if not by the caller, is what a call
// gets that arrives while a gateway closes its connections.
func (e *Error) passes() bool {
	if e.pushback != nil && *e.pushback < 0 {
		return false
	}
	return e.Code == codes.Unavailable || e.Code == codes.Canceled || e.Code == codes.ResourceExhausted && e.RetryDelay != nil
}

// delay is how long the gateway asks to wait; 0 if it does not.
func (e *Error) delay() time.Duration {
	switch {
	case e == nil:
		return 0
	case e.RetryDelay != nil:
		return *e.RetryDelay
	case e.pushback != nil:
		return *e.pushback
	}
	return 0
}

// endOf is the failure of a call whose context has ended. last is how its last attempt failed; nil without one.
func endOf(ctx context.Context, last *Error, requestID string) *Error {
	failure := &Error{Code: codes.Canceled, Message: "canceled by the caller", RequestID: requestID}
	if ctx.Err() == context.DeadlineExceeded {
		failure.Code, failure.Message = codes.DeadlineExceeded, "the deadline passed"
	}
	if last != nil && last.Code != failure.Code {
		failure.Message += fmt.Sprintf("; the last attempt ended with %v", last)
	}
	return failure
}

const reasonPrefix = "ERROR_REASON_"

func first(values metadata.MD, name string) string { return firstOf(values.Get(name)...) }

func firstOf(values ...string) string {
	for _, value := range values {
		if value != "" {
			return value
		}
	}
	return ""
}
