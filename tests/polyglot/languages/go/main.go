// Command chat streams one answer from the gateway at the given address and prints its text and tool calls.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"deltawire.dev/go/codec"
	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc"
)

func main() {
	if err := chat(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func chat(target string) error {
	connection, err := grpc.Dial(target, grpc.WithInsecure(), grpc.WithDefaultCallOptions(grpc.ForceCodec(codec.Codec{})))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	text := "How warm is it in Oslo?"
	request := &deltawirev1.StreamChatCompletionRequest{
		Start: &deltawirev1.StreamChatCompletionRequest_Chat{Chat: &deltawirev1.ChatRequest{
			Messages: []*deltawirev1.ChatMessage{{
				Role: &deltawirev1.ChatMessage_User{User: &deltawirev1.UserMessage{Text: &text}},
			}},
			Tools: []*deltawirev1.Tool{{
				Name:        "get_weather",
				InputSchema: `{"type":"object","properties":{"city":{"type":"string"}}}`,
			}},
		}},
	}
	stream, err := deltawirev1.NewChatCompletionClient(connection).StreamChatCompletion(ctx, request)
	if err != nil {
		return err
	}
	var completed *deltawirev1.Completed
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		switch event := response.GetEvent().(type) {
		case *deltawirev1.StreamChatCompletionResponse_TextDelta:
			fmt.Print(event.TextDelta.GetText())
		case *deltawirev1.StreamChatCompletionResponse_ToolCallDelta:
			if call := event.ToolCallDelta.GetToolCall(); call != nil {
				fmt.Printf("\ntool call %s(%s)", call.GetToolName(), call.GetArguments())
			}
		case *deltawirev1.StreamChatCompletionResponse_Completed:
			completed = event.Completed
		}
	}
	if completed == nil || completed.GetError() != nil {
		return fmt.Errorf("not the whole answer: %v", completed.GetError())
	}
	fmt.Println("\ncompleted")
	return nil
}
