package deltawire

import (
	"encoding/json"
	"errors"
	"fmt"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

// User is a message from the user.
func User(text string) *deltawirev1.ChatMessage {
	return &deltawirev1.ChatMessage{Role: &deltawirev1.ChatMessage_User{User: &deltawirev1.UserMessage{Text: &text}}}
}

// System is a message with instructions for the model.
func System(text string) *deltawirev1.ChatMessage {
	return &deltawirev1.ChatMessage{Role: &deltawirev1.ChatMessage_System{System: &deltawirev1.SystemMessage{Text: &text}}}
}

// Assistant is an earlier turn of the model, such as answer.Choice().Message.
func Assistant(message *deltawirev1.AssistantMessage) *deltawirev1.ChatMessage {
	return &deltawirev1.ChatMessage{Role: &deltawirev1.ChatMessage_Assistant{Assistant: message}}
}

// ToolResult is the result of one of the model's tool calls.
func ToolResult(call *deltawirev1.ToolCall, text string) *deltawirev1.ChatMessage {
	result := &deltawirev1.ToolMessage{CallId: call.GetCallId(), Text: &text}
	return &deltawirev1.ChatMessage{Role: &deltawirev1.ChatMessage_Tool{Tool: result}}
}

// Chat is a request for one streamed completion.
func Chat(chat *deltawirev1.ChatRequest) *deltawirev1.StreamChatCompletionRequest {
	return &deltawirev1.StreamChatCompletionRequest{Start: &deltawirev1.StreamChatCompletionRequest_Chat{Chat: chat}}
}

// Resume is a request for the rest of a stream with retention, after an event; nil is for all of it.
func Resume(completionID string, lastSequence *int64) *deltawirev1.StreamChatCompletionRequest {
	point := &deltawirev1.ResumePoint{CompletionId: completionID, LastSequence: lastSequence}
	return &deltawirev1.StreamChatCompletionRequest{Start: &deltawirev1.StreamChatCompletionRequest_Resume{Resume: point}}
}

// ParseTools reads tools as JSON: one, or a list. Each is a Tool of the API as protobuf writes it, or OpenAI's object. A
// schema is kept as it is written.
func ParseTools(text []byte) ([]*deltawirev1.Tool, error) {
	var list []json.RawMessage
	if json.Unmarshal(text, &list) != nil {
		list = []json.RawMessage{text}
	}
	tools := make([]*deltawirev1.Tool, 0, len(list))
	for _, each := range list {
		tool, err := parseTool(each)
		if err != nil {
			return nil, fmt.Errorf("tool %d: %w", len(tools)+1, err)
		}
		tools = append(tools, tool)
	}
	return tools, nil
}

func parseTool(text []byte) (*deltawirev1.Tool, error) {
	var given struct {
		Type     string
		Function *struct {
			Name, Description string
			Parameters        json.RawMessage
			Strict            *bool
		}
	}
	if err := json.Unmarshal(text, &given); err != nil {
		return nil, err
	}
	tool := &deltawirev1.Tool{}
	switch function := given.Function; {
	case function != nil:
		tool.Name, tool.Description, tool.Strict = function.Name, function.Description, function.Strict
		tool.InputSchema = string(function.Parameters)
	case given.Type != "":
		return nil, fmt.Errorf("a tool of type %q is none that a model can call here", given.Type)
	default:
		if err := protojson.Unmarshal(text, tool); err != nil {
			return nil, err
		}
	}
	if tool.Name == "" {
		return nil, errors.New("it has no name")
	}
	return tool, nil
}
