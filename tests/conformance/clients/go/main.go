// Command program is the Go client of the conformance tests: it makes the calls that it reads from its standard input and
// writes what the client reports of them to its standard output.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"os"

	"deltawire.dev/go"
	conformancev1 "deltawire.dev/go/conformance/v1"
	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

func main() {
	in := bufio.NewReader(os.Stdin)
	for {
		given, err := read(in)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			log.Fatal(err)
		}
		result, err := run(given)
		if err != nil {
			log.Fatal(err)
		}
		result.Name = given.GetName()
		written, err := proto.Marshal(result)
		if err != nil {
			log.Fatal(err)
		}
		length := make([]byte, 4)
		binary.BigEndian.PutUint32(length, uint32(len(written)))
		if _, err := os.Stdout.Write(append(length, written...)); err != nil {
			log.Fatal(err)
		}
	}
}

func read(in io.Reader) (*conformancev1.ClientCase, error) {
	var length uint32
	if err := binary.Read(in, binary.BigEndian, &length); err != nil {
		return nil, err
	}
	text := make([]byte, length)
	if _, err := io.ReadFull(in, text); err != nil {
		return nil, err
	}
	given := &conformancev1.ClientCase{}
	return given, proto.Unmarshal(text, given)
}

func run(given *conformancev1.ClientCase) (*conformancev1.ClientResult, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if given.GetTimeout() != nil {
		ctx, cancel = context.WithTimeout(ctx, given.GetTimeout().AsDuration())
		defer cancel()
	}
	client, err := deltawire.Dial(given.GetTarget(), deltawire.WithKey(given.GetAccessKey()))
	if err != nil {
		return nil, err
	}
	defer client.Close()
	result := &conformancev1.ClientResult{}
	if watch := given.GetWatch(); watch != nil {
		result.Models, err = models(client.WatchModels(ctx, watch.GetRequest().GetRevision(), nil), watch.GetBookmarks())
	} else {
		var received *deltawire.Answer
		received, err = stream(client.Stream(ctx, given.GetStream().GetRequest()), given.GetStream().CancelAfterEvents)
		result.Answer = answer(received)
	}
	if err != nil {
		result.Failure, err = failure(err)
	}
	return result, err
}

func stream(stream *deltawire.Stream, cancelAfter *int32) (*deltawire.Answer, error) {
	defer stream.Close()
	for events := int32(0); ; events++ {
		if cancelAfter != nil && events == *cancelAfter {
			stream.Close()
		}
		if _, err := stream.Recv(); err != nil {
			return stream.Final()
		}
	}
}

func models(watch *deltawire.Watch, bookmarks int32) ([]*deltawirev1.Model, error) {
	defer watch.Close()
	for bookmarks > 0 {
		event, err := watch.Recv()
		if err != nil {
			return nil, err
		}
		if event.Bookmark {
			bookmarks--
		}
	}
	return watch.Models(), nil
}

func answer(given *deltawire.Answer) *conformancev1.Answer {
	if given == nil {
		return nil
	}
	return &conformancev1.Answer{
		CompletionId: given.Started.GetCompletionId(),
		Model:        given.Started.GetModel(),
		Choices:      given.Choices,
		Usage:        given.Usage,
		Notices:      given.Notices,
	}
}

func failure(err error) (*conformancev1.Failure, error) {
	var failed *deltawire.Error
	if !errors.As(err, &failed) {
		return nil, err
	}
	result := &conformancev1.Failure{
		Code: int32(failed.Code), Reason: failed.Reason, Interrupted: failed.Interrupted, Partial: answer(failed.Answer),
	}
	if failed.RetryDelay != nil {
		result.RetryDelay = durationpb.New(*failed.RetryDelay)
	}
	for _, each := range failed.Violations {
		result.Fields = append(result.Fields, each.Field)
	}
	return result, nil
}
