package deltawire

import (
	"fmt"
	"sort"
	"strings"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// Answer is what the events of a stream add up to.
type Answer struct {
	// Started says which model and provider answer; nil if it was not received.
	Started *deltawirev1.Started
	// Choices by ascending index, each with its whole text and reasoning, its tool calls, those that failed, and the
	// log-probabilities of the text. Run the calls only if ToolCallsExecutable is true.
	Choices []*deltawirev1.Completed_Choice
	// Usage is the latest usage.
	Usage *deltawirev1.Usage
	// Notices are those of the gateway, in order.
	Notices []*deltawirev1.Notice
	// Completed is the last event; nil if it was not received.
	Completed *deltawirev1.Completed
}

// Choice is the first choice; an empty one if there is none, or no answer.
func (a *Answer) Choice() *deltawirev1.Completed_Choice {
	if a == nil || len(a.Choices) == 0 {
		return &deltawirev1.Completed_Choice{Message: &deltawirev1.AssistantMessage{}}
	}
	return a.Choices[0]
}

// Text is the text of the first choice.
func (a *Answer) Text() string { return a.Choice().GetMessage().GetText() }

// accumulator folds events into an answer and checks them against the rules of the stream.
type accumulator struct {
	answer Answer
	parts  map[int32]*parts
	// The sequences of the first event that is read and of the next one.
	first, next int64
	// Whether the stream is read from a later event than its first.
	fromMiddle bool
}

type parts struct {
	choice          *deltawirev1.Completed_Choice
	text, reasoning strings.Builder
}

func newAccumulator(last *int64) *accumulator {
	folded := &accumulator{parts: map[int32]*parts{}}
	if last != nil {
		folded.fromMiddle, folded.first, folded.next = true, *last+1, *last+1
	}
	return folded
}

// hasBegun reports whether any part of the answer was received. A heartbeat is none.
func (a *accumulator) hasBegun() bool {
	return a.answer.Started != nil || a.fromMiddle && a.next > a.first
}

// isOnlyTheEnd reports whether a stream that is read from the middle had no event: then all of it was read before.
func (a *accumulator) isOnlyTheEnd() bool { return a.fromMiddle && a.next == a.first }

// receive takes the next event. One of an unknown kind is counted and otherwise skipped.
func (a *accumulator) receive(event *deltawirev1.StreamChatCompletionResponse) *Error {
	if event.GetSequence() != a.next {
		return broken("event %d was expected and %d came", a.next, event.GetSequence())
	}
	if a.answer.Completed != nil {
		return broken("an event came after the last one")
	}
	a.next++
	_, isHeartbeat := event.GetEvent().(*deltawirev1.StreamChatCompletionResponse_Heartbeat)
	_, isStarted := event.GetEvent().(*deltawirev1.StreamChatCompletionResponse_Started)
	if event.GetEvent() != nil && !isHeartbeat && !a.fromMiddle && isStarted != (a.answer.Started == nil) {
		return broken("started must come first, and once")
	}
	switch given := event.GetEvent().(type) {
	case *deltawirev1.StreamChatCompletionResponse_Started:
		a.answer.Started = given.Started
	case *deltawirev1.StreamChatCompletionResponse_TextDelta:
		parts := a.of(event)
		parts.text.WriteString(given.TextDelta.GetText())
		parts.choice.Logprobs = append(parts.choice.Logprobs, given.TextDelta.GetLogprobs()...)
	case *deltawirev1.StreamChatCompletionResponse_ReasoningDelta:
		a.of(event).reasoning.WriteString(given.ReasoningDelta.GetText())
	case *deltawirev1.StreamChatCompletionResponse_ToolCallDelta:
		// A verdict has all that the fragments before it had.
		choice := a.of(event).choice
		switch outcome := given.ToolCallDelta.GetOutcome().(type) {
		case *deltawirev1.ToolCallDelta_ToolCall:
			choice.Message.ToolCalls = append(choice.Message.ToolCalls, outcome.ToolCall)
		case *deltawirev1.ToolCallDelta_Failure:
			choice.FailedToolCalls = append(choice.FailedToolCalls, given.ToolCallDelta)
		}
	case *deltawirev1.StreamChatCompletionResponse_ChoiceFinished:
		finish(a.of(event).choice, given.ChoiceFinished)
	case *deltawirev1.StreamChatCompletionResponse_UsageUpdate:
		a.answer.Usage = given.UsageUpdate.GetUsage()
	case *deltawirev1.StreamChatCompletionResponse_Notice:
		a.answer.Notices = append(a.answer.Notices, given.Notice)
	case *deltawirev1.StreamChatCompletionResponse_Completed:
		a.answer.Completed, a.answer.Usage = given.Completed, given.Completed.GetUsage()
	}
	return nil
}

// result is the answer as far as it was received.
func (a *accumulator) result() *Answer {
	answer := a.answer
	answer.Choices = nil
	if a.fromMiddle && answer.Completed != nil && !answer.Completed.GetMessagesOmitted() {
		// Only Completed has what was not read here.
		answer.Choices = answer.Completed.GetChoices()
		return &answer
	}
	for _, parts := range a.parts {
		choice := proto.Clone(parts.choice).(*deltawirev1.Completed_Choice)
		if text := parts.text.String(); text != "" {
			choice.Message.Text = &text
		}
		choice.Message.Reasoning = parts.reasoning.String()
		// Calls may be run only if the whole answer ended well.
		choice.ToolCallsExecutable = choice.ToolCallsExecutable && answer.Completed != nil && answer.Completed.GetError() == nil
		answer.Choices = append(answer.Choices, choice)
	}
	sort.Slice(answer.Choices, func(i, j int) bool { return answer.Choices[i].Index < answer.Choices[j].Index })
	return &answer
}

func (a *accumulator) of(event *deltawirev1.StreamChatCompletionResponse) *parts {
	index := event.GetChoiceIndex()
	if a.parts[index] == nil {
		choice := &deltawirev1.Completed_Choice{Index: index, Message: &deltawirev1.AssistantMessage{}}
		a.parts[index] = &parts{choice: choice}
	}
	return a.parts[index]
}

func finish(choice *deltawirev1.Completed_Choice, end *deltawirev1.ChoiceFinished) {
	choice.StopReason = end.GetStopReason()
	choice.EngineFinishReason = end.GetEngineFinishReason()
	choice.ToolCallsExecutable = end.GetToolCallsExecutable()
	switch matched := end.GetMatched().(type) {
	case *deltawirev1.ChoiceFinished_MatchedStop:
		choice.Matched = &deltawirev1.Completed_Choice_MatchedStop{MatchedStop: matched.MatchedStop}
	case *deltawirev1.ChoiceFinished_MatchedTokenId:
		choice.Matched = &deltawirev1.Completed_Choice_MatchedTokenId{MatchedTokenId: matched.MatchedTokenId}
	}
}

func broken(format string, values ...interface{}) *Error {
	message := "the gateway broke the rules of its stream: " + fmt.Sprintf(format, values...)
	return &Error{Code: codes.Internal, Message: message, Interrupted: true}
}
