// Command chat streams one answer of a model and prints its text and its tool calls.
//
// Its exit status is 0 if the answer is whole, 1 if the call failed, 2 if the command line is wrong, and 130 after Ctrl-C.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"deltawire.dev/go"
	deltawirev1 "deltawire.dev/go/deltawire/v1"
)

func main() {
	target := flag.String("target", "127.0.0.1:50051", "the gateway")
	model := flag.String("model", "", "the model; may be omitted if the gateway has only one")
	file := flag.String("tool", "", "a JSON file with one tool or a list, in deltawire's or OpenAI's form")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: chat [-target HOST:PORT] [-model NAME] [-tool FILE] PROMPT")
		flag.PrintDefaults()
	}
	flag.Parse()
	request := &deltawirev1.ChatRequest{Model: *model}
	prompt := strings.Join(flag.Args(), " ")
	if prompt == "" {
		flag.Usage()
		os.Exit(2)
	}
	request.Messages = append(request.Messages, deltawire.User(prompt))
	if *file != "" {
		text, err := os.ReadFile(*file)
		if err == nil {
			request.Tools, err = deltawire.ParseTools(text)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", *file, err)
			os.Exit(2)
		}
	}
	// Canceling reaches the engine: it stops generating.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := chat(ctx, *target, request); err != nil {
		fmt.Fprintln(os.Stderr, err)
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

func chat(ctx context.Context, target string, request *deltawirev1.ChatRequest) error {
	client, err := deltawire.Dial(target, deltawire.WithKey(os.Getenv("DELTAWIRE_TOKEN")))
	if err != nil {
		return err
	}
	defer client.Close()
	stream := client.Stream(ctx, deltawire.Chat(request))
	defer stream.Close()
	begun := false
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if begun {
				fmt.Println() // ends the line of the text so far
			}
			return err
		}
		text := event.GetTextDelta().GetText()
		begun = begun || text != ""
		fmt.Print(text)
	}
	answer, err := stream.Final()
	if err != nil {
		return err
	}
	choice := answer.Choice()
	for _, call := range choice.GetMessage().GetToolCalls() {
		fmt.Printf("\ntool call: %s(%s)", call.GetToolName(), call.GetArguments())
	}
	for _, call := range choice.GetFailedToolCalls() {
		// Never run such a call. What the model wrote is in RawArguments.
		fmt.Printf("\nfailed tool call: %s: %s", call.GetToolName(), call.GetFailure().GetMessage())
	}
	fmt.Printf("\n[%s, %d tokens", choice.GetStopReason(), answer.Usage.GetCompletionTokens())
	if choice.GetToolCallsExecutable() {
		fmt.Print(", tool calls may be executed")
	}
	fmt.Println("]")
	return nil
}
