package deltawire

import (
	"context"
	"sort"
	"time"

	deltawirev1 "deltawire.dev/go/deltawire/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// ModelEvent is a change of a model, or a bookmark.
type ModelEvent struct {
	// Change is the kind of change; unspecified in a bookmark.
	Change deltawirev1.WatchModelsResponse_Change
	// Model is the model after the change, or its last version if it was removed; nil in a bookmark.
	Model *deltawirev1.Model
	// Revision is from where another watch can continue after this event; empty within a snapshot.
	Revision string
	// Bookmark says that the events up to here add up to the state at Revision. The first one follows the snapshot.
	Bookmark bool
}

// Watch returns all models and then each change once, across lost connections. It never ends by itself.
type Watch struct {
	client   *Client
	ctx      context.Context
	cancel   context.CancelFunc
	call     deltawirev1.ModelRegistry_WatchModelsClient
	revision string
	known    map[string]*deltawirev1.Model
	// Whether known are all models at the revision: if not, removed ones cannot be reported after a new snapshot.
	knowsAll bool
	// The ids in the snapshot that is being received; nil if none is.
	listed    map[string]bool
	events    []*ModelEvent
	pauses    pauses
	requestID string
	err       error
}

// WatchModels watches the models. An empty revision begins with a snapshot of all of them; otherwise the watch continues
// from a revision of an earlier one, whose models are known. Without those, a revision that the gateway no longer has fails
// with REVISION_GONE. Canceling the context, or its deadline, ends the watch.
func (c *Client) WatchModels(ctx context.Context, revision string, known []*deltawirev1.Model) *Watch {
	ctx, cancel := context.WithCancel(ctx)
	ctx, requestID := withRequestID(ctx)
	w := &Watch{
		client: c, ctx: ctx, cancel: cancel, revision: revision, known: map[string]*deltawirev1.Model{},
		knowsAll: revision == "" || known != nil, pauses: pauses{max: 10 * time.Second}, requestID: requestID,
	}
	for _, model := range known {
		w.known[model.GetId()] = model
	}
	return w
}

// Recv returns the next event. Its error is an *Error that a new attempt would meet again.
func (w *Watch) Recv() (*ModelEvent, error) {
	for len(w.events) == 0 {
		if w.err != nil {
			return nil, w.err
		}
		message, err := w.receive()
		if err != nil {
			w.ended(err)
		} else {
			w.pauses.count = 0
			w.fold(message)
		}
	}
	event := w.events[0]
	w.events = w.events[1:]
	return event, nil
}

// Models are the models as of the last message, by ascending id. After a bookmark they are the state at its revision.
func (w *Watch) Models() []*deltawirev1.Model {
	models := make([]*deltawirev1.Model, 0, len(w.known))
	for _, model := range w.known {
		models = append(models, model)
	}
	sort.Slice(models, func(i, j int) bool { return models[i].GetId() < models[j].GetId() })
	return models
}

// Close ends the watch.
func (w *Watch) Close() { w.cancel() }

func (w *Watch) receive() (*deltawirev1.WatchModelsResponse, error) {
	if w.call == nil {
		w.listed = nil
		if w.revision == "" {
			w.listed = map[string]bool{}
		}
		request := &deltawirev1.WatchModelsRequest{Revision: w.revision, BatchSnapshot: w.revision == ""}
		call, err := deltawirev1.NewModelRegistryClient(w.client.conn).WatchModels(w.ctx, request)
		if err != nil {
			return nil, err
		}
		w.call = call
	}
	return w.call.Recv()
}

// fold takes a message. A change of a kind that this version does not know is skipped.
func (w *Watch) fold(message *deltawirev1.WatchModelsResponse) {
	if message.GetBookmark() {
		if w.listed != nil {
			for _, model := range w.Models() {
				if !w.listed[model.GetId()] {
					delete(w.known, model.GetId())
					w.add(deltawirev1.WatchModelsResponse_CHANGE_REMOVED, model)
				}
			}
		}
		w.listed, w.revision = nil, message.GetRevision()
		w.events = append(w.events, &ModelEvent{Revision: w.revision, Bookmark: true})
		return
	}
	if w.listed == nil {
		w.revision = message.GetRevision()
	}
	models := message.GetModels()
	if len(models) == 0 {
		models = []*deltawirev1.Model{message.GetModel()}
	}
	for _, model := range models {
		w.change(message.GetChange(), model)
	}
}

func (w *Watch) change(change deltawirev1.WatchModelsResponse_Change, model *deltawirev1.Model) {
	known := w.known[model.GetId()]
	switch change {
	case deltawirev1.WatchModelsResponse_CHANGE_REMOVED:
		if known == nil && w.knowsAll {
			return
		}
		delete(w.known, model.GetId())
	case deltawirev1.WatchModelsResponse_CHANGE_ADDED, deltawirev1.WatchModelsResponse_CHANGE_MODIFIED:
		if w.listed != nil {
			w.listed[model.GetId()] = true
		}
		w.known[model.GetId()] = model
		if known != nil && proto.Equal(known, model) {
			return
		}
		if known != nil {
			change = deltawirev1.WatchModelsResponse_CHANGE_MODIFIED
		} else if w.knowsAll {
			change = deltawirev1.WatchModelsResponse_CHANGE_ADDED
		}
	default:
		return
	}
	w.add(change, model)
}

func (w *Watch) add(change deltawirev1.WatchModelsResponse_Change, model *deltawirev1.Model) {
	event := &ModelEvent{Change: change, Model: model}
	if w.listed == nil {
		event.Revision = w.revision
	}
	w.events = append(w.events, event)
}

// ended takes the end of a call: it ends the watch, or waits until it is time for the next call.
func (w *Watch) ended(err error) {
	failure := failureOf(w.call, err, w.requestID)
	w.call = nil
	if w.ctx.Err() != nil {
		w.fail(endOf(w.ctx, nil, w.requestID))
	} else if failure != nil && failure.Code == codes.OutOfRange && w.knowsAll && w.revision != "" {
		w.revision = "" // A new snapshot, of which only the differences are returned.
	} else if failure != nil && !w.survives(failure) {
		w.fail(failure)
	} else if !wait(w.ctx, w.pauses.next(failure)) {
		w.fail(endOf(w.ctx, failure, w.requestID))
	}
}

// survives reports whether a watch goes on after a failure.
func (w *Watch) survives(failure *Error) bool {
	switch failure.Code {
	case codes.Unavailable, codes.Aborted, codes.ResourceExhausted, codes.DeadlineExceeded:
		return true
	case codes.Internal, codes.Unknown, codes.Canceled:
		// The connection was lost, if not by the caller.
		return failure.Reason == "" && !isClosed(w.client.conn)
	}
	return false
}

func (w *Watch) fail(failure *Error) {
	w.err = failure
	w.cancel()
}
